"""Measures recall during training: accuracy on answers that only the memory can know, on synthetic data."""

from dataclasses import replace

import numpy as np
from lightning import Callback, LightningModule, Trainer

from infini_train.data.index import DatasetIndex
from infini_train.metrics.recall import correct_predictions
from infini_train.synthetic import EVALUATION, Task, documents, synthetic_task

from ..module import InfiniModule
from ..validation import metrics_of


class Recall(Callback):
    """Logs val/recall and val/recall_memory_off in each validation on a dataset that `infini-train prep synth` made.

    Of a dataset with a name they are val/NAME/recall and val/NAME/recall_memory_off.

    It generates further documents of the same kind, the same ones each time, with the greatest length and with all
    keys in use. (If the dataset has only passkeys, so do these documents, and digits are counted.) Every rank reads
    all of them, because a model that ZeRO-3 has split runs on all ranks or none. Training is not affected: no random
    state is used, and no lane's memory is touched.

    Args:
        count: number of documents, which are read side by side.
    """

    def __init__(self, count: int = 8):
        self.count = count

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, InfiniModule)
        for name, index in trainer.datamodule.validation.items():  # type: ignore[attr-defined]
            self._measure(trainer, pl_module, name, index)

    def _measure(self, trainer: Trainer, pl_module: InfiniModule, name: str, index: DatasetIndex) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if (drawn := synthetic_task(index.options)) is None:
            return
        mixture, vocabulary = drawn
        task: Task = replace(mixture.recall, shortest=None, fewest=None)
        if mixture.passkey_share == 1:
            task = replace(mixture.passkey, shortest=None)
        read = list(documents(task, vocabulary, self.count, seed=0, stream=EVALUATION))
        config = pl_module.config
        wanted_BT = np.stack([d.memory_only(config.segment_length, config.sliding_window) for d in read])
        if not wanted_BT.any():  # documents that local attention sees as a whole do not need the memory
            return
        segments = min(pl_module.segments_per_chunk or data.segments_per_window, data.segments_per_window)
        with trainer.precision_plugin.val_step_context():
            correct = correct_predictions(
                pl_module.model, read, wanted_BT, ("on", "off"), segments * data.segment_length, quiet=True
            )
        on, off = (float(correct[mode].sum() / wanted_BT.sum()) for mode in ("on", "off"))
        values = {f"{metrics_of(name)}recall": on, f"{metrics_of(name)}recall_memory_off": off}
        pl_module.log_dict(values, logger=False)
        pl_module.log_values(values)
        if trainer.state.fn == "validate" and trainer.is_global_zero:
            of, count = f" on {name}" if name else "", f"{wanted_BT.sum():,}"
            print(f"recall{of} of {count} answers that only the memory knows: {on:.4f}, memory off {off:.4f}")
