"""Locks a run's directory, since two trainings in it would overwrite and remove each other's checkpoints."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from infini_train.files import not_a_link
from infini_train.run_files import LOCK


def lock(run: Path) -> TextIO:
    """Lock a run's directory for this process, until the returned file is closed or the process ends in any way.

    This is a POSIX lock. It holds across the nodes of a shared file system, and loader workers that outlive a killed
    trainer do not inherit it. If the file system does not support locks, nothing is locked.

    Raises:
        BlockingIOError: another process holds the lock; the message names it.
        OSError: the file is a link, whose target this process must not write to.
    """
    file = open(run / LOCK, "a+", opener=not_a_link)  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either error
        file.seek(0)
        other = file.read().strip() or "another process"
        file.close()
        raise BlockingIOError(
            f"{run}: {other} is training there: wait until it ends, or give another --run (if its node is lost and "
            f"the file server does not know it, remove {run / LOCK})"
        ) from None
    except OSError:
        return file
    job = os.environ.get("SLURM_JOB_ID")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}{f', SLURM job {job},' if job else ''}\n")
    file.flush()
    return file
