"""Checkpoints: a directory that appears whole or not at all, written only at optimizer-step boundaries.

checkpoints/
    step-00000020/
        state-RRRRR-of-WWWWW.safetensors weights and optimizer state, see fragments.py
        state.ckpt                       schedule, Lightning's loops, names and shapes (torch.save, weights only)
        lanes-RRRRR-of-WWWWW.safetensors memories of each rank's lanes
        cursor.json                      where the reading stands after the last consumed batch
        metrics.json                     steps and tokens done, loss of the last step, last validation (of which step)
        model_config.json  config.yaml
        COMPLETE                         sizes of all files; written last
    latest                               name of the newest one; moves after COMPLETE
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

# Of a model's configuration, what a resumed run may not change.
FIXED = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "segment_length", "memory", "rope_parameters", "rms_norm_eps"),
    *("tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias"),
]


def step_of(path: Path) -> int:
    """Optimizer steps done at a checkpoint. Raises ValueError for a directory of another name."""
    try:
        return int(path.name.removeprefix("step-"))
    except ValueError:
        raise ValueError(f"{path}: expected the name of a checkpoint, step-NNNNNNNN") from None


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint under a run's `checkpoints`, None if there is none yet."""
    pointer = checkpoints / LATEST
    if pointer.is_file():
        return checkpoints / pointer.read_text().strip()
    return None


def check(path: Path, config: InfiniConfig | None = None) -> None:
    """Raises FileNotFoundError or ValueError unless `path` is a whole checkpoint (of this model, if given)."""
    if not (path / COMPLETE).is_file():
        raise FileNotFoundError(f"{path}: expected a complete checkpoint directory (no file {COMPLETE} in it)")
    for name, size in json.loads((path / COMPLETE).read_text()).items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise ValueError(
                f"{path / name}: found {'no file' if found is None else f'{found} bytes'}, expected {size}"
            )
    if config is not None:
        saved, mine = json.loads((path / MODEL_CONFIG).read_text()), config.to_dict()
        wrong = [f"{k}: found {saved[k]}, expected {mine[k]}" for k in FIXED if saved[k] != mine[k]]
        if wrong:
            raise ValueError(f"{path}: checkpoint of another model\n" + "\n".join(wrong))


def state_dict(saved: fragments.Fragments, state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of the trained Lightning module, tied embeddings under both names."""
    weights = {name: saved.whole(fragments.WEIGHT, name, shape) for name, shape in state["parameters"].items()}
    return weights | {alias: weights[name] for alias, name in state["tied"].items()}


def read_model(path: Path) -> tuple[InfiniConfig, dict[str, Tensor]]:
    """A checkpoint's model: its configuration and its state dictionary."""
    with fragments.Fragments(path) as saved:
        weights = state_dict(saved, fragments.read_state(path))
    config = InfiniConfig.from_json_file(path / MODEL_CONFIG)
    return config, {name.removeprefix("model."): value for name, value in weights.items()}


def write_tensors(files: dict[Path, dict[str, Tensor]]) -> None:
    """In a thread: write tensors and wait until they are on disk."""
    for path, tensors in files.items():
        try:
            save_file(tensors, path)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise not_written(path, error) from error
        sync(path)


def not_written(path: Path, error: Exception) -> OSError:
    free = shutil.disk_usage(path.parent).free
    return OSError(f"{path}: could not be written, {free:,} bytes free on its disk: {error}")
