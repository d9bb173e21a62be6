"""Which checkpoint of a run is the best one by a metric of its validations. checkpoint_directory.py keeps it."""

import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning import Trainer

from infini_train.run_files import BEST, METRICS, point_to, read_json


class BestCheckpoint:
    """Knows the best checkpoint of a run: the one of the step whose validation had the best value of a metric.

    Args:
        metric: a metric that validations log, such as `val/loss`.
        mode: `min` if lower values are better, `max` if higher ones are.

    Attributes:
        value: the best value so far, whose checkpoint is complete or is being written; the same on all ranks. None:
            there is none yet.
        path: on rank 0, the best complete checkpoint.
    """

    def __init__(self, metric: str, mode: Literal["min", "max"]):
        self.metric, self.mode = metric, mode
        self.value: float | None = None
        self.path: Path | None = None
        self._value_of_path: float | None = None

    def start(self, trainer: Trainer, directory: Path, checkpoints: Iterable[Path]) -> None:
        """Find the best one of the checkpoints that the run goes on from. All ranks must call this.

        Args:
            trainer: tells all ranks what rank 0 finds.
            directory: the run's `checkpoints` directory.
            checkpoints: the run's own complete checkpoints, by step, up to the one that it resumes.
        """
        if trainer.is_global_zero:
            for path in checkpoints:
                with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged one is not the best
                    self._take(path, read_json(path / METRICS))
            if self.path is None:
                (directory / BEST).unlink(missing_ok=True)
            else:
                point_to(self.path, BEST)
        self.value = trainer.strategy.broadcast(self._value_of_path)

    def improves(self, metrics: dict[str, Any]) -> bool:
        """Return whether the validation in a checkpoint's METRICS is better than all before.

        Raises:
            ValueError: the validation has no such metric.
        """
        found = metrics["validation"]
        if self.metric not in found:
            logged = ", ".join(name for name in found if name != "step")
            raise ValueError(f"checkpoint.best: found {self.metric}, expected one of {logged}")
        return self._better(self._value(metrics), self.value)

    def taken(self, metrics: dict[str, Any]) -> None:
        """Note that a checkpoint with these METRICS is complete or is being written."""
        self.value = self._value(metrics)

    def completed(self, path: Path, metrics: dict[str, Any]) -> None:
        """Make a complete checkpoint with these METRICS the best one, if it is. Only rank 0 calls this."""
        if self._take(path, metrics):
            point_to(path, BEST)

    def _take(self, path: Path, metrics: dict[str, Any]) -> bool:
        value = self._value(metrics)
        if better := self._better(value, self._value_of_path):
            self.path, self._value_of_path = path, value
        return better

    def _value(self, metrics: dict[str, Any]) -> float | None:
        """Return the metric's value in the validation of the checkpoint's own step, if it has one."""
        found = metrics["validation"]
        return found.get(self.metric) if found and found["step"] == metrics["step"] else None

    def _better(self, value: float | None, than: float | None) -> bool:
        if value is None or not math.isfinite(value):
            return False
        return than is None or (value < than if self.mode == "min" else value > than)
