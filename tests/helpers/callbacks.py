"""Callbacks for runs of tests, to be named in --trainer.callbacks."""

from lightning import Callback


class StopInsideAStep(Callback):
    """Asks Lightning to stop after a micro-batch, as EarlyStopping and max_time do."""

    def __init__(self, batch: int):
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            trainer.should_stop = True
