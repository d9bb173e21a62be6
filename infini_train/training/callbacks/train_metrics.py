"""Logs loss, gradient norm and learning rates of every optimizer step."""

from typing import Any

from lightning import LightningModule, Trainer

from infini_train.data.batches import Batch

from ..module import InfiniModule
from ..step_callback import StepCallback
from .step_guard import StepGuard


class TrainMetrics(StepCallback):
    """Logs train/* after every optimizer step, and shows the loss in the progress bar.

    Args:
        guard: measures the gradient norm, and counts the steps that it has skipped.
    """

    def __init__(self, guard: StepGuard):
        self.guard = guard
        self.rates: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # The schedule moves on before a step's metrics are logged.
        self.rates = {f"train/lr_{group['name']}": group["lr"] for group in trainer.optimizers[0].param_groups}

    def on_step_end(self, trainer: Trainer, module: InfiniModule, batch: Batch) -> None:
        step, data = trainer.global_step, trainer.datamodule  # type: ignore[attr-defined]
        loss = module.mean_step_loss().item()
        module.log("loss", loss, prog_bar=True, logger=False)
        values = {"train/loss": loss, "train/tokens": step * data.window * data.lanes}
        if self.guard.norm is not None:
            values["train/gradient_norm"] = self.guard.norm.item()
        if self.guard.skipped:
            values["train/skipped_steps"] = self.guard.skipped
        module.log_values(values | self.rates)
