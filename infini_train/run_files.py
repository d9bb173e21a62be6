"""The files of a run: their names, which checkpoints are whole, and what the run records about itself.

This module does not import torch, because `infini-train inspect` and preflight use it too.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from .files import plain_name, write_file

CONFIG = "config.yaml"  # in the run's directory and in each checkpoint
FIRST_ERROR = "first-error.txt"  # of training; a run with this file has failed
VALIDATION_ERROR = "first-validation-error.txt"  # of `validate`, which says nothing of the training
LOCK = "lock"  # held by global rank 0 during training
CHECKPOINTS = "checkpoints"  # the directory of checkpoints
LATEST, BEST = "latest", "best"  # in the directory of checkpoints; each holds the name of one of them
RECORD = "run.json"
SKIPPED_STEPS = "skipped-steps.jsonl"  # the steps that were left out, with their documents
HEAT_MAP_CELL = 16  # pixels of a side of each value in the heat maps of layers x heads that a run logs
COMPLETE, CURSOR, METRICS, MODEL_CONFIG = "COMPLETE", "cursor.json", "metrics.json", "model_config.json"


class FileSums(TypedDict):
    """What COMPLETE knows of a file: its size in bytes, and its digest, None in checkpoints of earlier versions."""

    size: int
    xxh3: str | None


class Record(TypedDict):
    """What a run records about itself, in the file RECORD.

    Attributes:
        begun_from: the checkpoint that the run began from, as an absolute path; None: initial weights.
        restore: what it took from there, the option `restore`.
        saved: the checkpoints that the run has written, by name, each with a digest of the digests of its files. The
            run removes no others.
    """

    begun_from: str | None
    restore: str
    saved: dict[str, str]


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError that names the file if it holds none."""
    try:
        return json.loads(path.read_text(), object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise ValueError(f"{path}: damaged: found no JSON ({error})") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that occurs twice: one flipped bit makes `state-00001` of `state-00000`."""
    if repeated := [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]:
        raise ValueError(f"the name {repeated[0]} occurs twice")
    return dict(pairs)


def read_record(run: Path) -> Record:
    """Read what a run has recorded about itself; for a run that has recorded nothing yet: an empty record.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / RECORD
    if not path.is_file():
        return Record(begun_from=None, restore="all", saved={})
    advice = "; remove it: the run goes on from its checkpoints, and will remove none of those that are there now"
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}{advice}") from None
    kinds: dict[str, Callable[[Any], bool]] = {
        "begun_from": lambda value: value is None or isinstance(value, str),
        "restore": lambda value: value in ("all", "weights", "optimizer", "ema"),
        "saved": lambda value: isinstance(value, dict),
    }
    if not isinstance(found, dict) or not all(right(found.get(name, 0)) for name, right in kinds.items()):
        raise ValueError(f"{path}: damaged: found {str(found)[:80]}, expected {', '.join(kinds)}{advice}")
    return Record(begun_from=found["begun_from"], restore=found["restore"], saved=found["saved"])


def write_record(run: Path, record: Record) -> None:
    """Replace what a run has recorded about itself."""
    write_file(run / RECORD, json.dumps(record, indent=1).encode() + b"\n")


def is_checkpoint_name(name: str) -> bool:
    """Return whether this is the name of a checkpoint's directory."""
    return re.fullmatch(r"step-[0-9]+", name) is not None


def step_of(path: Path) -> int:
    """Return how many optimizer steps a checkpoint has done. Raises ValueError for a directory of another name."""
    if not is_checkpoint_name(path.name):
        raise ValueError(f"{path}: expected the name of a checkpoint, step-NNNNNNNN")
    return int(path.name.removeprefix("step-"))


def complete(checkpoints: Path) -> list[Path]:
    """Return the checkpoints in a run's `checkpoints` directory that were written to the end, by step."""
    named = [path for path in checkpoints.glob("step-*") if is_checkpoint_name(path.name)]
    return sorted((path for path in named if (path / COMPLETE).is_file()), key=step_of)


def latest(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint in a run's `checkpoints` directory, or None if there is none yet.

    It is the one that the file LATEST names. If this file is lost, or names a directory that does not exist, it is
    the complete checkpoint of the highest step.

    Raises:
        ValueError: LATEST names something outside the directory.
    """
    return _named_in(checkpoints / LATEST) or next(reversed(complete(checkpoints)), None)


def best(checkpoints: Path) -> Path | None:
    """Return the best checkpoint in a run's `checkpoints` directory, which the file BEST names; None: there is none.

    Raises:
        ValueError: BEST names something outside the directory.
    """
    return _named_in(checkpoints / BEST)


def _named_in(pointer: Path) -> Path | None:
    """Return the checkpoint beside the file `pointer` whose name it holds, or None if it holds no such name."""
    name = pointer.read_text(errors="replace").strip("\0 \n") if pointer.is_file() else ""
    if name:
        plain_name(name, pointer)
    return pointer.parent / name if is_checkpoint_name(name) and (pointer.parent / name).is_dir() else None


def point_to(checkpoint: Path, name: str) -> None:
    """Make a checkpoint the one that the file `name`, LATEST or BEST, of its directory names."""
    write_file(checkpoint.parent / name, checkpoint.name.encode())


def find(path: Path) -> Path:
    """Return the checkpoint that `path` means.

    It may be the checkpoint itself, one of the files `latest` and `best` that name one, or a run or its `checkpoints`
    directory, of which the latest is meant.
    """
    if (path / COMPLETE).is_file():
        return path
    if path.name in (LATEST, BEST) and path.is_file():
        return _named_in(path) or path
    return latest(path) or latest(path / CHECKPOINTS) or path


def files_of(checkpoint: Path) -> dict[str, FileSums]:
    """Return what COMPLETE lists: the files of a checkpoint with their sizes and digests.

    Raises:
        ValueError: it is damaged, or names a file outside the checkpoint.
    """
    path = checkpoint / COMPLETE
    listed = read_json(path)
    files: dict[str, FileSums] = {}
    for name, sums in listed.items() if isinstance(listed, dict) else []:
        size, xxh3 = sums if isinstance(sums, list) and len(sums) == 2 else (sums, None)
        plain_name(name, path)
        if type(size) is not int or not isinstance(xxh3, str | None):
            raise ValueError(f"{path}: damaged: found {name!r}: {sums!r}, expected the name of a file and its size")
        files[name] = FileSums(size=size, xxh3=xxh3)
    if not files:
        raise ValueError(f"{path}: damaged: found no list of files")
    return files


def changed(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint is missing or of another size, in a phrase; None: they all are right.

    Raises:
        ValueError: COMPLETE is damaged.
    """
    for name, sums in files_of(checkpoint).items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != sums["size"]:
            return f"{file}: found {'no file' if found is None else f'{found} bytes'}, expected {sums['size']}"
    return None
