"""Preemption: a signal sets a flag; at the next step boundary all ranks agree, save, and leave together.

A handler that saved by itself would deadlock: it runs in the middle of a collective, at another step on every rank.
Nothing here imports torch, so that the handlers are there before its import, which takes seconds.
"""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lightning import Trainer

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# Names the file by which a batch script knows that the run was interrupted and wants to be started again.
MARKER = "INFINI_PREEMPTED"

_received: signal.Signals | None = None


def listen() -> None:
    """From now on a signal of SIGNALS only sets the flag. Called in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: object) -> None:
    global _received
    _received = signal.Signals(number)


def shield(worker: int) -> None:
    """Let only its parent end this process, a loader's worker of this number: some clusters signal workers too.

    The signals may not just be blocked: an interpreter that exits terminates its workers and waits for them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()  # not getppid(): a fork server may stand between
    assert parent is not None
    while signal.sigwaitinfo(SIGNALS).si_pid != parent.pid:
        pass
    os._exit(128 + signal.SIGTERM)


def agreed(trainer: "Trainer") -> bool:
    """Whether any rank has received a signal: the same answer on all ranks, which all ask together."""
    return trainer.strategy.reduce_boolean_decision(_received is not None, all=False)


def leave(trainer: "Trainer", checkpoint: Path | None) -> NoReturn:
    """End this rank after the run was saved. Exit code 0 where a batch script reads the marker, else the signal's."""
    marker = os.environ.get(MARKER)
    number = _received or signal.SIGTERM  # the signal may have gone to other ranks only
    if trainer.is_global_zero:
        print(f"infini-train: {number.name}: leaving, saved up to {checkpoint}", file=sys.stderr, flush=True)
        if marker:
            Path(marker).touch()
    sys.exit(0 if marker else 128 + number)
