"""The checkpoint format. A checkpoint is a directory that appears complete or not at all, after an optimizer step.

checkpoints/
    step-00000020/
        state-RRRRR-of-WWWWW.safetensors weights and optimizer state of rank R of W, see fragments.py
        state.ckpt                       schedule, Lightning's loops, names and shapes (torch.save, weights only)
        lanes-RRRRR-of-WWWWW.safetensors memories of each rank's lanes
        cursor.json                      state of the lane scheduler after the last consumed batch
        metrics.json                     steps and tokens done, loss of the last step, last validation and its step
        model_config.json  config.yaml
        COMPLETE                         sizes of all files; written last
    latest                               name of the newest checkpoint; moves after COMPLETE is written
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from infini_train.files import sync
from infini_train.model import InfiniConfig
from infini_train.run_files import COMPLETE, LATEST, MODEL_CONFIG

from . import fragments

# Fields of a model's configuration that a resumed run may not change.
FIXED = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "segment_length",
        "sliding_window",
        "memory",
        "rope_parameters",
        "rms_norm_eps",
    ),
    *("tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias", "qk_norm"),
]


def step_of(path: Path) -> int:
    """Return how many optimizer steps a checkpoint has done. Raises ValueError for a directory of another name."""
    try:
        return int(path.name.removeprefix("step-"))
    except ValueError:
        raise ValueError(f"{path}: expected the name of a checkpoint, step-NNNNNNNN") from None


def latest(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint in a run's `checkpoints` directory, or None if there is none yet."""
    pointer = checkpoints / LATEST
    if pointer.is_file():
        return checkpoints / pointer.read_text().strip()
    return None


def check(path: Path, config: InfiniConfig | None = None) -> None:
    """Check that `path` is a complete checkpoint, and that it is of this model if `config` is given.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: a file is missing or has another size, or the checkpoint is of another model.
    """
    if not (path / COMPLETE).is_file():
        raise FileNotFoundError(f"{path}: expected a complete checkpoint directory (no file {COMPLETE} in it)")
    for name, size in json.loads((path / COMPLETE).read_text()).items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise ValueError(
                f"{path / name}: found {'no file' if found is None else f'{found} bytes'}, expected {size}"
            )
    if config is not None:
        # A checkpoint may be older than an option, whose default it then has.
        saved, mine = InfiniConfig().to_dict() | json.loads((path / MODEL_CONFIG).read_text()), config.to_dict()
        wrong = [f"{k}: found {saved[k]}, expected {mine[k]}" for k in FIXED if saved[k] != mine[k]]
        if wrong:
            raise ValueError(f"{path}: checkpoint of another model\n" + "\n".join(wrong))


def state_dict(saved: fragments.Fragments, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of the Lightning module. Tied embeddings appear under both names.

    Args:
        saved: the checkpoint's fragments.
        state: content of the checkpoint's state.ckpt.
    """
    weights = {name: saved.whole(fragments.WEIGHT, name, shape) for name, shape in state["parameters"].items()}
    return weights | {alias: weights[name] for alias, name in state["tied"].items()}


def read_model(path: Path) -> tuple[InfiniConfig, dict[str, Tensor]]:
    """Return the configuration and the state dictionary of the model in a checkpoint."""
    with fragments.Fragments(path) as saved:
        weights = state_dict(saved, fragments.read_state(path))
    config = InfiniConfig.from_json_file(path / MODEL_CONFIG)
    return config, {name.removeprefix("model."): value for name, value in weights.items()}


def write_tensors(files: dict[Path, dict[str, Tensor]]) -> None:
    """Write each dictionary of tensors to its file, and wait until they are on disk. Runs in a thread."""
    for path, tensors in files.items():
        try:
            save_file(tensors, path)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise not_written(path, error) from error
        sync(path)


def not_written(path: Path, error: Exception) -> OSError:
    """Return an error that tells how much space was free on the disk when `path` could not be written."""
    free = shutil.disk_usage(path.parent).free
    return OSError(f"{path}: could not be written, {free:,} bytes free on its disk: {error}")
