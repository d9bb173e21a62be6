"""Loss, learning rates, and what the memories do: gates, size of the states, smallest normaliser."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ..module import InfiniModule
from ..strategy import gathered
from .nonfinite import NonFiniteGuard


class MemoryHealth(Callback):
    """Logs train/* every step and memory/* every log_every_n_steps.

    Args:
        guard: measures the gradient norm, which is logged here.
    """

    def __init__(self, guard: NonFiniteGuard):
        self.guard = guard

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, InfiniModule)
        if not pl_module.ends_step(batch_idx):
            return
        step = trainer.global_step
        loss = pl_module.mean_step_loss().item()
        pl_module.log("loss", loss, prog_bar=True, logger=False)
        values = {"train/loss": loss, "train/tokens": step * batch["input_ids"].shape[1] * trainer.datamodule.lanes}  # type: ignore[attr-defined]
        if self.guard.norm is not None:
            values["train/gradient_norm"] = self.guard.norm.item()
        if self.guard.skipped:
            values["train/skipped_steps"] = self.guard.skipped
        for group in trainer.optimizers[0].param_groups:
            values[f"train/lr_{group['name']}"] = group["lr"]
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values |= self._memory(pl_module, batch)
            self._gates(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    @staticmethod
    def _memory(module: InfiniModule, batch: Any) -> dict[str, float]:
        memory = module.lanes.take(batch["lane_ids"], module.device)
        assert memory is not None
        values = {}
        for name in memory[0]:
            stacked = torch.stack([layer[name].flatten(1) for layer in memory])  # [layers, lanes, ...]
            values[f"memory/{name}_norm_mean"] = stacked.norm(dim=-1).mean().item()
            values[f"memory/{name}_norm_max"] = stacked.norm(dim=-1).max().item()
            if name == "z":
                values["memory/z_min"] = stacked.min().item()
        return values

    @staticmethod
    def _gates(trainer: Trainer, module: InfiniModule) -> None:
        parameters = [p for n, p in module.named_parameters() if n.endswith("self_attn.gate")]
        with gathered(parameters, writes=False):
            gates = [torch.sigmoid(p.detach()).float() for p in parameters]
        if isinstance(trainer.logger, TensorBoardLogger):
            board, shares = trainer.logger.experiment, torch.stack(gates).cpu()  # [layers, heads]
            board.add_histogram("gates/share_of_memory", shares, trainer.global_step)
            # A heat map of layers (down) x heads (across), each cell 16 x 16 pixels, black 0 to white 1.
            image = shares.repeat_interleave(16, 0).repeat_interleave(16, 1)[None]
            board.add_image("gates/layer_by_head", image, trainer.global_step)
