"""Logs how the memories are used: gates, norms of the states, and how much the heads read."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from infini_train.data.batches import Batch
from infini_train.metrics.memory_use import MemoryUse
from infini_train.model.attention import NEAR_STATE
from infini_train.model.rules import RULES
from infini_train.run_files import HEAT_MAP_CELL

from ..module import InfiniModule
from ..step_callback import StepCallback
from ..strategy import gathered
from ..validation import metrics_of


class MemoryMetrics(StepCallback):
    """Logs memory/* and gates/* every log_every_n_steps, and how much the heads read in each validation.

    gates/* show sigmoid(beta). The share of the memory in a head's output may also depend on its input, so it is
    measured in validation, over the tokens whose read means anything: val/memory_share, and val/memory_read_norm, the
    norm of the reads over that of local attention's outputs. Both are means over heads; heat maps show every head.
    Where validation datasets have names, all of this is logged for each, and for all of them together.
    """

    def __init__(self) -> None:
        self.counting = ExitStack()  # holds the hooks on the model during a validation batch

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, InfiniModule)
        names = trainer.datamodule.validation  # type: ignore[attr-defined]
        self.uses = {name: MemoryUse(pl_module.model) for name in names}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert isinstance(pl_module, InfiniModule)
        real_BT = batch["docs"].to(pl_module.device) >= 0
        use = list(self.uses.values())[dataloader_idx]
        self.counting.enter_context(use.counting(pl_module.model, real_BT))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.counting.close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, InfiniModule)
        for use in self.uses.values():
            use.sums = trainer.strategy.reduce(use.sums, reduce_op="sum")
        if "" not in self.uses:
            together = MemoryUse(pl_module.model)
            together.sums = torch.stack([use.sums for use in self.uses.values()]).sum(0)
            self.uses[""] = together
        for name, use in self.uses.items():
            if not use.sums.any():
                continue
            share, norm = use.shares_and_norms()
            values = {"memory_share": share.mean().item(), "memory_read_norm": norm.mean().item()}
            pl_module.log_values({f"{metrics_of(name)}{metric}": value for metric, value in values.items()})
            heads = f"heads/{name}/" if name else "heads/"
            _heat_map(trainer, f"{heads}memory_share", share)
            _heat_map(trainer, f"{heads}read_norm_of_both", norm / (1 + norm))

    def on_step_end(self, trainer: Trainer, module: InfiniModule, batch: Batch) -> None:
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        memory = module.lanes.take(batch["lane_ids"], module.device)
        assert memory is not None
        layers = memory[: module.config.num_hidden_layers]  # without the output memory
        of_rule = [{name: x for name, x in layer.items() if name not in NEAR_STATE} for layer in layers]
        values = RULES[module.config.memory].metrics(of_rule)
        module.log_values({f"memory/{name}": value for name, value in values.items()})
        parameters = [p for n, p in module.named_parameters() if n.endswith("self_attn.gate")]
        with gathered(parameters, writes=False):
            gates = [torch.sigmoid(p.detach()).float() for p in parameters]
        shares = torch.stack(gates).cpu()  # [layers, heads]
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_histogram("gates/share_of_memory", shares, trainer.global_step)
        _heat_map(trainer, "gates/layer_by_head", shares)


def _heat_map(trainer: Trainer, tag: str, values: Tensor) -> None:
    """Log an image of values [layers, heads]: a square for each, from black (0 and NaN) to white (1)."""
    if isinstance(trainer.logger, TensorBoardLogger):
        image = values.nan_to_num().repeat_interleave(HEAT_MAP_CELL, 0).repeat_interleave(HEAT_MAP_CELL, 1)[None]
        trainer.logger.experiment.add_image(tag, image, trainer.global_step)
