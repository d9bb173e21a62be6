"""Shows the size of a model and the progress of a run: a bar on a terminal, plain lines in a file."""

import re
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

SECONDS = 10.0  # minimum time between lines


class ModelSize(ModelSummary):
    """Prints the number of parameters in one line; Lightning's table has a row for the whole model and no FLOPs."""

    @staticmethod
    def summarize(summary_data: Any, total_parameters: int, *args: Any, **kwargs: Any) -> None:
        print(f"infini-train: model of {total_parameters:,} parameters", flush=True)


class RunProgressBar(RichProgressBar):
    """Lightning's bar over the micro-batches of a run, without epoch number and version, which mean nothing here."""

    @property
    def total_train_batches(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches  # Lightning's bar would end at max_steps

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class ProgressLines(Logger):
    """Prints logged values on rank 0, a line for the first step, for the last one, and at most every 10 s between.

    It is a logger because loggers receive numbers on the host, so that it needs no device sync and no collective.

    Args:
        max_steps: optimizer steps of the whole run.
    """

    name = "lines"  # type: ignore[assignment]
    version = 0  # type: ignore[assignment]

    def __init__(self, max_steps: int):
        super().__init__()
        self.max_steps = max_steps
        self.begin = time.monotonic()
        self.step = self.printed_step = 0
        self.printed_at: float | None = None
        self.values: dict[str, float] = {}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        if "val/loss" in metrics:
            loss, benefit = metrics["val/loss"], metrics["val/memory_benefit"]
            named = {tag.split("/")[1]: x for tag, x in metrics.items() if re.fullmatch(r"val/[^/]+/loss", tag)}
            of_datasets = f" ({', '.join(f'{name} {x:.4f}' for name, x in named.items())})" if named else ""
            self._print(step, f"validation loss {loss:.4f}{of_datasets}, memory benefit {benefit:.4f}")
        if "train/loss" in metrics:
            self.step = step
        self.values |= metrics
        if self.printed_at is None:
            due = "train/loss" in metrics
        else:  # speeds are logged every log_every_n_steps, after the loss of the same step
            due = "speed/tokens_per_second" in metrics and time.monotonic() - self.printed_at >= SECONDS
        if due:
            self._progress()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.printed_step < self.step:
            self._progress()

    def _progress(self) -> None:
        now = time.monotonic()
        words = [f"{self.step / self.max_steps:5.1%}", f"loss {self.values['train/loss']:.4f}"]
        rate, seconds = (self.values.get(f"speed/{name}") for name in ("tokens_per_second", "step_seconds"))
        if rate is not None:
            words.append(f"{rate:,.0f} tokens/s")
        words.append(f"elapsed {_duration(now - self.begin)}")
        if seconds is not None and self.step < self.max_steps:
            words.append(f"ends in {_duration((self.max_steps - self.step) * seconds)}")
        self._print(self.step, "  ".join(words))
        self.printed_step, self.printed_at = self.step, now

    def _print(self, step: int, text: str) -> None:
        print(f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}  {text}", flush=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
