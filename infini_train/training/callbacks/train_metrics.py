"""Logs loss, gradient norm and learning rates of every optimizer step."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from ..module import InfiniModule
from .nonfinite import NonFiniteGuard


class TrainMetrics(Callback):
    """Logs train/* after every optimizer step, and shows the loss in the progress bar.

    Args:
        guard: measures the gradient norm, and counts the steps that it has skipped.
    """

    def __init__(self, guard: NonFiniteGuard):
        self.guard = guard

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, InfiniModule)
        if not pl_module.ends_step(batch_idx):
            return
        step, data = trainer.global_step, trainer.datamodule  # type: ignore[attr-defined]
        loss = pl_module.mean_step_loss().item()
        pl_module.log("loss", loss, prog_bar=True, logger=False)
        values = {"train/loss": loss, "train/tokens": step * data.window * data.lanes}
        if self.guard.norm is not None:
            values["train/gradient_norm"] = self.guard.norm.item()
        if self.guard.skipped:
            values["train/skipped_steps"] = self.guard.skipped
        for group in trainer.optimizers[0].param_groups:
            values[f"train/lr_{group['name']}"] = group["lr"]
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
