"""The checkpoint format. A checkpoint is a directory that appears complete or not at all, after an optimizer step.

checkpoints/
    step-00000020/
        state-RRRRR-of-WWWWW.safetensors weights and optimizer state of rank R of W, see fragments.py
        state.ckpt                       schedule, Lightning's loops, names and shapes (torch.save, weights only)
        lanes-RRRRR-of-WWWWW.safetensors memories of each rank's lanes
        cursor.json                      state of the lane scheduler after the last consumed batch
        metrics.json                     steps and tokens done, loss of the last step, last validation and its step
        model_config.json  config.yaml
        COMPLETE                         sizes and digests (XXH3) of all files; written last
    latest                               name of the newest checkpoint; moves after COMPLETE is written
    best                                 name of the best one, with --checkpoint.best; moves when that one is complete

Every file is read back when it has been written, and the counters in them before `latest` names the checkpoint.
Whoever loads a checkpoint compares the digests first (`verify`). Checkpoints of earlier versions have sizes only.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infini_train.files import allow_reading, sync, xxh3_of_file
from infini_train.model import InfiniConfig
from infini_train.run_files import (
    COMPLETE,
    CONFIG,
    CURSOR,
    METRICS,
    MODEL_CONFIG,
    FileSums,
    changed,
    complete,
    files_of,
    is_checkpoint_name,
    read_json,
    step_of,
)

from . import fragments

# Fields of a model's configuration that a resumed run may not change.
FIXED = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "segment_length",
        "sliding_window",
        "output_memory_dim",
        "memory",
        "memory_base",
        "rope_parameters",
        "rms_norm_eps",
    ),
    *("tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias", "qk_norm"),
]
# Of these, what a run may change that takes only the weights: no weight's shape or use depends on them.
GEOMETRY = ("segment_length", "sliding_window")
TENSORS = ".safetensors"  # the large files
# Without these fields, JSON files are damaged; checkpoints of earlier versions have no digests.
FIELDS = {
    METRICS: ("step", "tokens", "loss", "validation"),
    CURSOR: ("step",),
    MODEL_CONFIG: ("hidden_size",),
}


def check(path: Path, config: InfiniConfig | None = None, *, weights_only: bool = False) -> None:
    """Check that `path` is a complete checkpoint whose files can be parsed, and that the small ones are as written.

    `verify` compares the digests of all, which takes time.

    Args:
        path: directory of the checkpoint.
        config: the model that will be loaded from it; None: any.
        weights_only: only the weights will be loaded, so that segments may have another length.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: a file is missing or damaged, or the checkpoint is of another model.
    """
    # All ranks of a job check the checkpoint, but one of them is enough to read those beside it.
    first = getattr(rank_zero_only, "rank", 0) == 0
    if not (path / COMPLETE).is_file():
        beside = f"; {_advice(path)}" if first and is_checkpoint_name(path.name) and path.is_dir() else ""
        raise FileNotFoundError(
            f"{path}: expected a complete checkpoint directory (no file {COMPLETE} in it){beside}"
        )
    fault = _unreadable(path)
    if fault is None:
        small = {name: sums for name, sums in files_of(path).items() if not name.endswith(TENSORS)}
        fault = _differs(path, small)
    if fault is not None:
        raise ValueError(f"{fault}; {_advice(path)}" if first else fault)
    if config is not None:
        # A checkpoint may be older than an option, whose default it then has.
        saved, mine = InfiniConfig().to_dict() | read_json(path / MODEL_CONFIG), config.to_dict()
        fixed = [name for name in FIXED if not (weights_only and name in GEOMETRY)]
        wrong = [f"{k}: found {saved[k]}, expected {mine[k]}" for k in fixed if saved[k] != mine[k]]
        if wrong:
            raise ValueError(
                f"{path}: this checkpoint is of another model; give the options of the model that it holds\n"
                + "\n".join(wrong)
            )


def verify(path: Path, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a checkpoint with their digests.

    Args:
        path: directory of a complete checkpoint.
        part, parts: read only this one of so many shares of the files, because other ranks read the others.

    Raises:
        ValueError: a file is not as it was written.
    """
    if fault := _differs(path, dict(list(files_of(path).items())[part::parts])):
        raise ValueError(f"{fault}; {_advice(path)}")


def fault_of(path: Path) -> str | None:
    """Read a whole checkpoint, and return what is wrong with it in a phrase; None: nothing."""
    return _unreadable(path) or _differs(path, files_of(path))


def _differs(path: Path, files: Mapping[str, FileSums]) -> str | None:
    """Return what is wrong with the contents of these files in a phrase; None: nothing."""
    for name, sums in files.items():
        if sums["xxh3"] is not None and (found := xxh3_of_file(path / name)) != sums["xxh3"]:
            return f"{path / name}: damaged: found contents with digest {found}, expected {sums['xxh3']}"
    return None


def _unreadable(path: Path) -> str | None:
    try:
        if fault := changed(path):
            return fault
        for name in files_of(path):
            _parse(path / name)
    except ValueError as error:
        return str(error)
    return None


def _parse(file: Path) -> None:
    """Raise ValueError that names the file if it has not the form that its name tells."""
    try:
        if file.name == fragments.STATE:
            fragments.read_state(file.parent)
        elif file.suffix == ".json":
            found = read_json(file)
            if found is not None or file.name != CURSOR:  # streamed data has no cursor
                _check_fields(file, found, FIELDS.get(file.name, ()))
        elif file.suffix == TENSORS:
            with safe_open(file, "pt"):
                pass
        elif file.name == CONFIG:
            found = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            _check_fields(file, found, ("model",))
            _check_fields(file, found["model"], ("optimizer",))
    except (SafetensorError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: damaged: {' '.join(str(error).split())}") from None


def _check_fields(file: Path, found: Any, expected: Collection[str]) -> None:
    """Raise ValueError if the contents of a file are not an object with these fields."""
    if not isinstance(found, dict) or not all(name in found for name in expected):
        raise ValueError(f"{file}: damaged: found {str(found)[:80]}, expected an object with {', '.join(expected)}")


def _advice(path: Path) -> str:
    """Return a phrase on which older checkpoint beside a damaged one is whole. It reads them until it finds one."""
    if not is_checkpoint_name(path.name):
        return "the checkpoint cannot be used"
    older = [other for other in complete(path.parent) if step_of(other) < step_of(path)]
    whole = next((other for other in reversed(older) if fault_of(other) is None), None)
    if whole is None:
        return f"no older checkpoint in {path.parent} is whole"
    return f"{whole} is whole: --ckpt_path {whole} goes on from there"


def read_back(path: Path, step: int) -> None:
    """Check that a checkpoint which is about to become the latest can be loaded, and is of this step.

    Raises:
        OSError: what was read is not what was to be written.
    """
    fault = changed(path)
    if fault is None:
        state, cursor, metrics = fragments.read_state(path), read_json(path / CURSOR), read_json(path / METRICS)
        counters = {
            f"global_step in {fragments.STATE}": state["global_step"],
            f"optimizer steps of Lightning's loops in {fragments.STATE}": _steps_in_loops(state),
            f"step in {CURSOR}": step if cursor is None else cursor["step"],  # streamed data has no cursor
            f"step in {METRICS}": metrics["step"],
        }
        fault = "; ".join(f"{name}: found {n}, expected {step}" for name, n in counters.items() if n != step)
    if fault:
        raise OSError(f"{path}: could not be read back after it was written, and was not kept: {fault}")


def _steps_in_loops(state: dict[str, Any]) -> Any:
    loop = (state["loops"]["fit_loop"] or {}).get("epoch_loop.automatic_optimization.optim_progress", {})
    return loop.get("optimizer", {}).get("step", {}).get("total", {}).get("completed")


def state_dict(saved: fragments.Fragments, state: dict[str, Any], *, average: bool = False) -> dict[str, Tensor]:
    """Return the weights of the Lightning module. Tied embeddings appear under both names.

    Args:
        saved: the checkpoint's fragments.
        state: content of the checkpoint's state.ckpt.
        average: return the moving average of the weights instead.

    Raises:
        ValueError: there is no average.
    """
    kinds = dict.fromkeys(state["parameters"], fragments.WEIGHT)
    if average:
        # A parameter without an average has never had a gradient, so it has not changed.
        averaged = {name: fragments.EMA for name in kinds if fragments.EMA in saved.optimizer_kinds(name)}
        if not averaged:
            raise ValueError(
                f"{saved.directory}: found no average of the weights in it; a run keeps one from its first step on "
                "with --model.optimizer.ema_decay"
            )
        kinds |= averaged
    weights = {name: saved.whole(kinds[name], name, shape) for name, shape in state["parameters"].items()}
    return weights | {alias: weights[name] for alias, name in state["tied"].items()}


def read_model(path: Path, *, average: bool = False) -> tuple[InfiniConfig, dict[str, Tensor]]:
    """Return the configuration and the state dictionary of the model in a checkpoint.

    Args:
        path: directory of the checkpoint.
        average: return the moving average of the weights instead of the weights.

    Raises:
        ValueError: the checkpoint has no such average.
    """
    with fragments.Fragments(path) as saved:
        weights = state_dict(saved, fragments.read_state(path), average=average)
    config = InfiniConfig.from_json_file(path / MODEL_CONFIG)
    return config, {name.removeprefix("model."): value for name, value in weights.items()}


def write_tensors(files: dict[Path, dict[str, Tensor]], others: Mapping[Path, bytes] = {}) -> dict[str, FileSums]:
    """Write each dictionary of tensors to its file, wait until they are on disk, and read them back.

    It runs in a thread.

    Args:
        files: the tensors of each file.
        others: contents of other files, which are written first.

    Returns:
        size and digest of each file, by name.

    Raises:
        OSError: a file could not be written, or does not hold what was written to it.
    """
    written = {path.name: write_bytes(path, content) for path, content in others.items()}
    for path, tensors in files.items():
        try:
            save_file(tensors, path)
            allow_reading(path)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise not_written(path, error) from error
        sync(path)
        expected = _digest_of_tensors(path, tensors)
        forget_cached(path)
        written[path.name] = _as_written(path, expected)
    return written


def write_bytes(path: Path, content: bytes) -> FileSums:
    """Write a small file, wait until it is on disk, read it back, and return its size and digest."""
    try:
        path.write_bytes(content)
        sync(path)
    except OSError as error:
        raise not_written(path, error) from error
    return _as_written(path, xxhash.xxh3_128(content).hexdigest())


def _as_written(path: Path, expected: str) -> FileSums:
    if xxh3_of_file(path) != expected:
        raise not_written(path, "what was read back is not what was written")
    return FileSums(size=path.stat().st_size, xxh3=expected)


def forget_cached(path: Path) -> None:
    """Ask the system to drop its copies of a synced file from memory, so that it is read from the disk next time."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _digest_of_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Return the digest that the file must have if it holds these tensors: its header is read, the rest is known."""
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    digest, place = xxhash.xxh3_128(length + header), 0
    try:
        layout = json.loads(header)
        layout.pop("__metadata__", None)
        with safe_open(path, "pt") as found:  # a view of the file, of which only the header is read
            for name in sorted(tensors, key=lambda name: (layout[name]["data_offsets"], name)):
                tensor, view = tensors[name], found.get_tensor(name)
                content = tensor.reshape(-1).view(torch.uint8).numpy()
                same = view.dtype == tensor.dtype and view.shape == tensor.shape
                if not same or layout.pop(name)["data_offsets"] != [place, place + len(content)]:
                    raise ValueError(f"another {name}")
                digest.update(content.data)
                place += len(content)
        if layout:
            raise ValueError(f"more tensors: {', '.join(layout)}")
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise not_written(path, f"the header that was read back is not that of its tensors: {error}") from error
    return digest.hexdigest()


def not_written(path: Path, error: Exception | str) -> OSError:
    """Return an error that tells how much space was free on the disk when `path` could not be written."""
    free = shutil.disk_usage(path.parent).free
    message = f"{path}: could not be written, {free:,} bytes free on its disk: {error}"
    number = getattr(error, "errno", None)
    return OSError(message) if number is None else OSError(number, message)
