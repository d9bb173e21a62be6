"""Preemption and Ctrl-C: a signal sets a flag, and at the next step boundary all ranks agree, save and exit.

A signal handler that saved the checkpoint itself would deadlock, because it runs in the middle of a collective, and
at a different step on each rank. This module does not import torch, so that the handlers are installed before that
import, which takes seconds.
"""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from infini_train.errors import INTERRUPTED

if TYPE_CHECKING:
    from lightning import Trainer

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
SECONDS = 1.0  # between two looks of a loader's worker whether its parent is alive
# Environment variable with the name of a file, which tells a batch script to start the interrupted run again.
MARKER = "INFINI_PREEMPTED"

_received: signal.Signals | None = None
_interrupted = False  # whether SIGINT is among those that were received


def listen() -> None:
    """Install handlers that only set the flag, but for a second SIGINT. Must be called in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: object) -> None:
    global _received, _interrupted
    if number == signal.SIGINT and _interrupted:
        _say("SIGINT again: leaving at once, without saving")
        os._exit(INTERRUPTED)
    if number == signal.SIGINT:
        _say("SIGINT: saving and leaving at the end of this step; Ctrl-C again leaves at once")
        _interrupted = True
    _received = signal.Signals(number)


def _say(what: str) -> None:
    if all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        _write(f"infini-train: {what}")


def _write(line: str) -> None:
    os.write(
        sys.stderr.fileno(), f"\n{line}\n".encode()
    )  # a signal may interrupt print(), which cannot reenter itself


def leave_on_interrupt(name: str) -> None:
    """Let SIGINT end a command that has nothing to save. Lightning's own handling would exit with code 1.

    Args:
        name: the command as messages name it.
    """

    def leave(number: int, frame: object) -> NoReturn:
        _write(f"{name}: interrupted")
        sys.exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)


def shield(worker: int) -> None:
    """Make a data loader's worker process ignore signals that its parent has not sent; some clusters signal all.

    The signals cannot simply be blocked, because an interpreter that exits terminates its workers and waits for them.
    A worker whose parent was killed ends soon, too: torch would leave it waiting for ever where nobody reads any more
    what it has to send.

    Args:
        worker: the worker's number, which the loader passes.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()  # not getppid(), which may be a fork server
    assert parent is not None
    while parent.is_alive():
        received = signal.sigtimedwait(SIGNALS, SECONDS)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)  # any other code makes torch raise an error in the parent, in the midst of its own exit


def agreed(trainer: "Trainer") -> bool:
    """Return whether any rank has received a signal. All ranks call this together, and get the same answer."""
    return trainer.strategy.reduce_boolean_decision(_received is not None, all=False)


def leave(trainer: "Trainer", checkpoint: Path | None) -> NoReturn:
    """Exit after the run was saved: with code 0 where a batch script reads the marker, else with the signal's code.

    Args:
        trainer: of the run.
        checkpoint: the newest checkpoint, for the message; None: there is none.
    """
    marker = os.environ.get(MARKER)
    number = _received or signal.SIGTERM  # only other ranks may have received the signal
    if trainer.is_global_zero:
        what = checkpoint or "no step yet"
        print(f"infini-train: {number.name}: leaving, saved up to {what}", file=sys.stderr, flush=True)
        if marker:
            Path(marker).touch()
    sys.exit(0 if marker else 128 + number)
