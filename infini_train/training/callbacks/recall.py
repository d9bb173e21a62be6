"""Recall during training: accuracy on what only the memory can know, where the validation data asks for it."""

from dataclasses import replace

import numpy as np
from lightning import Callback, LightningModule, Trainer

from infini_train.metrics.recall import right
from infini_train.synthetic import EVALUATION, Task, documents, synthetic_task

from ..module import InfiniModule


class Recall(Callback):
    """Logs val/recall and val/recall_memory_off with each validation on a dataset that `data_prep synth` drew.

    New documents of its kind are drawn, always the same, of its longest length and with all keys in use (of a dataset
    of passkeys alone: passkeys, whose digits are counted). Every rank reads all of them, as none can run a model that
    ZeRO-3 has split by itself. Training is left as it was: no random state is used, no lane's memory touched.

    Args:
        count: of the documents, read side by side.
    """

    def __init__(self, count: int = 8):
        self.count = count

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, InfiniModule)
        assert pl_module.model is not None
        data = trainer.datamodule  # type: ignore[attr-defined]
        if (drawn := synthetic_task(data.index["validation"].options)) is None:
            return
        mixture, vocabulary = drawn
        task: Task = replace(mixture.recall, shortest=None, fewest=None)
        if mixture.passkey_share == 1:
            task = replace(mixture.passkey, shortest=None)
        read = list(documents(task, vocabulary, self.count, seed=0, stream=EVALUATION))
        wanted_BT = np.stack([d.memory_only(data.segment_length) for d in read])
        if not wanted_BT.any():  # documents of a single segment
            return
        with trainer.precision_plugin.val_step_context():
            found = right(pl_module.model, read, wanted_BT, ("on", "off"), data.window, quiet=True)
        on, off = (float(found[mode].sum() / wanted_BT.sum()) for mode in ("on", "off"))
        values = {"val/recall": on, "val/recall_memory_off": off}
        pl_module.log_dict(values, logger=False)
        for logger in trainer.loggers:  # Lightning would log one step too early
            logger.log_metrics(values, step=trainer.global_step)
        if trainer.state.fn == "validate" and trainer.is_global_zero:
            print(f"recall of {wanted_BT.sum():,} answers that only the memory knows: {on:.4f}, memory off {off:.4f}")
