"""The base class of callbacks that act after an optimizer step."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from infini_train.data.batches import Batch

from .module import InfiniModule


class StepCallback(Callback):
    """A callback that acts after every optimizer step, rather than after every micro-batch."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, InfiniModule)
        if pl_module.ends_step(batch_idx):
            self.on_step_end(trainer, pl_module, batch)

    def on_step_end(self, trainer: Trainer, module: InfiniModule, batch: Batch) -> None:
        """Act after an optimizer step, whose last micro-batch on this rank is `batch`."""
        raise NotImplementedError
