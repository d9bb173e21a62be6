"""Stops training before an optimizer step whose loss or gradient is not finite, or skips that step."""

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from torch.optim import Optimizer

from infini_train.data.batches import Batch

from ..module import InfiniModule, StepCallback
from ..strategy import ZeroStrategy


class NonFiniteError(RuntimeError):
    """The loss or a gradient is not finite. The weights are still those of the last good step."""


class NonFiniteGuard(StepCallback):
    """Checks the loss and the total gradient norm of every optimizer step, with one device sync.

    Gradients are averaged over ranks before the check, so if the norm is not finite on one rank it is not on any, and
    all ranks act alike. Under ZeRO, where no rank has all gradients, DeepSpeed measures the norm and skips such a
    step by itself.

    Args:
        directory: where this rank's micro-batches of a bad step are written for replay.
        action: `stop` ends the run before the step; `skip` skips the step and empties memories that are not finite.
    """

    def __init__(self, directory: Path, action: Literal["stop", "skip"] = "stop"):
        self.directory, self.action = directory, action
        self.batches: list[dict[str, Any]] = []  # of the current step
        self.step = 0
        self.skipped = 0
        self.norm: torch.Tensor | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.batches, self.step = [], trainer.global_step
        self.batches.append({k: batch[k] for k in ("input_ids", "labels", "starts", "docs", "lane_ids")})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if isinstance(trainer.strategy, ZeroStrategy):
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if not self._good(trainer, pl_module, torch.nn.utils.get_total_norm(gradients)):
            for p in pl_module.parameters():
                p.grad = None  # the optimizer skips parameters without a gradient

    def on_step_end(self, trainer: Trainer, module: InfiniModule, batch: Batch) -> None:
        if isinstance(trainer.strategy, ZeroStrategy):
            norm = trainer.strategy.deepspeed_engine.get_global_grad_norm()
            self._good(trainer, module, torch.as_tensor(norm))

    def _good(self, trainer: Trainer, pl_module: LightningModule, norm: torch.Tensor) -> bool:
        """Return False if the step must be skipped. Raises NonFiniteError if the run must stop."""
        assert isinstance(pl_module, InfiniModule)
        assert pl_module.step_loss is not None
        self.norm = norm
        if torch.isfinite(norm) and torch.isfinite(pl_module.step_loss):
            return True
        step, rank = self.step, trainer.global_rank
        path = self.directory / f"nonfinite-step-{step:08d}-rank-{rank:05d}.pt"
        torch.save(self.batches, path)
        lanes = [lane for batch in self.batches for lane in batch["lane_ids"].tolist()]
        documents = sorted({d for batch in self.batches for d in batch["docs"].unique().tolist()})
        message = (
            f"step {step}, rank {rank}: found loss {pl_module.step_loss.item():g} and gradient norm "
            f"{norm.item():g}, expected finite numbers; lanes {lanes}, documents {documents}; "
            f"micro-batches dumped to {path}"
        )
        if self.action == "stop":
            raise NonFiniteError(message)
        self.skipped += 1
        emptied = pl_module.lanes.empty_non_finite()
        print(f"infini-train: left out {message}; memories emptied: {emptied}", file=sys.stderr, flush=True)
        return False
