"""Ends the whole job if a rank fails or hangs, and reports the first error with its rank, step and lanes."""

import faulthandler
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from infini_train.errors import exit_code

GRACE = 5.0  # seconds that other ranks have to report an error before they are killed


class Faults(Callback):
    """Ends every rank of a failing job at once; the others would otherwise wait in a collective for the failed one.

    The first rank to fail writes its error to a file, so that ranks which fail because of it can report it too.

    Args:
        path: file to write the first error to, in the run's directory.
        hang_timeout: seconds without a finished micro-batch after which a rank prints its stacks and ends the job.
        expected: errors that are reported without a traceback and, if the user can fix them, end with exit code 2.

    Raises:
        ValueError: the time is not positive.
    """

    def __init__(self, path: Path, hang_timeout: float, expected: tuple[type[Exception], ...]):
        if not hang_timeout > 0:
            raise ValueError(f"hang_timeout: found {hang_timeout}, expected more than 0 seconds")
        self.path, self.hang_timeout, self.expected = path, hang_timeout, expected
        self.deadline: float | None = None  # None: nothing is running that could hang
        self.lanes: list[int] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._progress()
        threading.Thread(target=self._watch, args=(trainer,), daemon=True).start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.deadline = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.lanes = batch["lane_ids"].tolist()
        self._progress()

    def on_train_batch_end(self, *args: Any) -> None:
        self._progress()

    def on_validation_batch_end(self, *args: Any) -> None:
        self._progress()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.deadline = None
        if not isinstance(exception, Exception):
            return
        message = f"{type(exception).__name__}: {exception}"
        if trainer.world_size == 1:  # a single process ends by itself, in an orderly way
            self._record(trainer, message)
            return
        # After another rank has failed, this one fails in a collective, whose traceback would bury the first error.
        known = isinstance(exception, self.expected) or self.path.is_file()
        if not known or os.environ.get("INFINI_TRACEBACK"):
            traceback.print_exception(exception)
        self._end(trainer, message, exit_code(exception, self.expected))

    def _progress(self) -> None:
        self.deadline = time.monotonic() + self.hang_timeout

    def _watch(self, trainer: Trainer) -> None:
        while (deadline := self.deadline) is not None:  # read once, because another thread may set it to None
            if time.monotonic() > deadline:
                faulthandler.dump_traceback(all_threads=True)
                self._end(trainer, f"no micro-batch finished in {self.hang_timeout:g} s; the stacks are above")
            time.sleep(min(1.0, self.hang_timeout / 10))

    def _record(self, trainer: Trainer, message: str) -> str:
        """Write the error for other ranks and for `infini-train inspect`, and return the first error of the job."""
        where = f"rank {trainer.global_rank} of {trainer.world_size}, step {trainer.global_step}, lanes {self.lanes}"
        try:
            with open(self.path, "x") as file:
                file.write(f"{where}: {message}")
        except OSError:
            pass  # another rank was first, or the file cannot be written
        # The file is empty if the disk was full.
        return (self.path.read_text() if self.path.is_file() else "") or f"{where}: {message}"

    def _end(self, trainer: Trainer, message: str, code: int = 1) -> None:
        first = self._record(trainer, message)
        # Ranks that Lightning's launcher started from rank 0 would outlive it. Those that fail too may report first.
        for process in getattr(trainer.strategy.launcher, "procs", []):
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        print(f"infini-train: error: {first}", file=sys.stderr, flush=True)
        os._exit(code)  # an orderly exit would wait for the other ranks
