"""The runs of a report: what their files tell."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infini_train.run_files import CONFIG

from .events import History, Point, history
from .report import Report, examine, read_yaml


@dataclass
class Run:
    """A run, and all that the report needs of it.

    Attributes:
        path: its directory.
        name: what the report calls it: the directory's name, or the whole path where two have the same name.
        state: what `infini-train inspect` tells.
        logged: its curves, images and texts.
        config: its configuration; None: it cannot be read.
    """

    path: Path
    name: str
    state: Report
    logged: History
    config: Any

    def points(self, tag: str) -> list[Point]:
        """Return the points of a curve, or none."""
        return self.logged.points.get(tag, [])

    def tokens_per_step(self) -> int:
        """Return how many tokens an optimizer step reads, or 0 if that was not logged."""
        step, _, tokens = next(iter(self.points("train/tokens")), Point(1, 0.0, 0.0))
        return round(tokens / step)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs; one that is given twice is read once.

    Raises:
        ValueError: some of them are no runs, or have logged nothing. The message names all of these.
    """
    given: dict[Path, Path] = {}
    for path in paths:
        given.setdefault(path.resolve(), path)
    names = [whole.name for whole in given]
    found, faults = [], []
    for path, name in zip(given.values(), names, strict=True):
        try:
            state = examine(path, time.time())
        except OSError as error:
            faults.append(str(error))
            continue
        logged = history(path / "tensorboard")
        if not logged.points:
            faults.append(f"{path}: found no point of a curve in {path / 'tensorboard'}, expected those of a run")
            continue
        name = name if names.count(name) == 1 else str(path)
        found.append(Run(path, name, state, logged, read_yaml(path / CONFIG)))
    if faults:
        raise ValueError("; ".join(faults))
    return found
