"""Stops before an optimizer step whose loss or gradient is not finite; logs the gradient norm."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from ..module import InfiniModule


class NonFiniteError(RuntimeError):
    """The loss or a gradient is not finite. The weights are still those of the last good step."""


class NonFiniteGuard(Callback):
    """Checks the step's loss and total gradient norm once per optimizer step: one device sync.

    A norm that is not finite on one rank is so on all, after gradients were averaged, so all stop alike.

    Args:
        directory: where the step's micro-batches of this rank are dumped for replay.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.batches: list[dict[str, Any]] = []  # of the current step
        self.norm: torch.Tensor | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.batches = []
        self.batches.append({k: batch[k] for k in ("input_ids", "labels", "starts", "docs", "lane_ids")})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, InfiniModule)
        assert pl_module.step_loss is not None
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients)
        if torch.isfinite(self.norm) and torch.isfinite(pl_module.step_loss):
            return
        step, rank = trainer.global_step, trainer.global_rank
        path = self.directory / f"nonfinite-step-{step:08d}-rank-{rank:05d}.pt"
        torch.save(self.batches, path)
        lanes = [lane for batch in self.batches for lane in batch["lane_ids"].tolist()]
        documents = sorted({d for batch in self.batches for d in batch["docs"].unique().tolist()})
        raise NonFiniteError(
            f"step {step}, rank {rank}: found loss {pl_module.step_loss.item():g} and gradient norm "
            f"{self.norm.item():g}, expected finite numbers; lanes {lanes}, documents {documents}; "
            f"micro-batches dumped to {path}"
        )
