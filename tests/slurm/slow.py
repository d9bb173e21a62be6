"""Steps as a test wants them, on any machine: --trainer.callbacks tests.slurm.slow.Slow."""

import time
from typing import Any

from lightning import Callback


class Slow(Callback):
    """Sleeps in every micro-batch.

    Args:
        seconds: how long.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)


class Fails(Callback):
    """A fault that no restart mends."""

    def on_train_batch_start(self, *args: Any) -> None:
        raise RuntimeError("planted")
