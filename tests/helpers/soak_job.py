"""A job of a soak (soak.py): its ranks as processes, what interrupts them, and how they ended."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.runs import CONTEXT, watch_calls
from tests.helpers.soak_plan import SIGNALS, Interruption

GRACE = 60.0  # seconds after the end of a rank in which the others must end by themselves; the machine may be busy
PATIENCE = 1200.0  # seconds after which a job hangs


@dataclass
class Ended:
    """How a job ended: the ranks' exit codes and output; when it began; whether it was interrupted; how many ranks
    did not end by themselves; whether it took longer than PATIENCE."""

    codes: list[int]
    printed: list[str]
    began: float
    interrupted: bool = False
    left_behind: int = 0
    hangs: bool = False

    @property
    def errors(self) -> list[list[str]]:
        """The error messages of each rank."""
        return [re.findall(r"^infini-train(?: fit)?: error: .*", text, re.MULTILINE) for text in self.printed]

    @property
    def refusal(self) -> str | None:
        """The message with which the job was refused; None if it was not, or not in one line of each rank."""
        if 0 in self.codes or any(len(lines) > 1 for lines in self.errors) or "Traceback" in "".join(self.printed):
            return None
        # Where each rank refuses by itself, only the first one looks for an older checkpoint.
        return max((line for lines in self.errors for line in lines), key=len, default=None)


def run_job(
    words: list[str],
    count: int,
    directory: Path,
    draw: random.Random,
    variables: dict[str, Any],
    interruption: Interruption | None = None,
) -> Ended:
    """Run `infini-train` on `count` ranks, as a launcher does that starts each rank by itself.

    Args:
        words: the command and its options.
        count: number of ranks.
        directory: for the ranks' output while they run.
        draw: random numbers, which choose the ranks that are interrupted.
        variables: environment variables of the ranks.
        interruption: what is done to them; None: nothing.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    instants = CONTEXT.Value("i", 0)
    outputs = [Path(tempfile.mkstemp(dir=directory, suffix=".txt")[1]) for _ in range(count)]
    ranks = []
    for rank, output in enumerate(outputs):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "NODE_RANK": 0}
        environment = {name: str(value) for name, value in {**environment, **variables}.items()}
        ranks.append(CONTEXT.Process(target=_rank, args=(rank, words, environment, instants, output)))
        ranks[-1].start()
    ended = Ended([], [], time.time())
    begin, first = time.monotonic(), None
    while any(rank.is_alive() for rank in ranks):
        if interruption is not None and not ended.interrupted and instants.value >= interruption.instants:
            time.sleep(interruption.seconds)
            ended.interrupted = True
            interrupt(interruption.name, [rank.pid for rank in ranks if rank.is_alive()], draw)
        if first is None and any(rank.exitcode for rank in ranks):
            first = time.monotonic()
        if first is not None and time.monotonic() - first > GRACE:  # srun --kill-on-bad-exit does it at once
            ended.left_behind = sum(rank.is_alive() for rank in ranks)
        ended.hangs = time.monotonic() - begin > PATIENCE
        if ended.left_behind or ended.hangs:
            for rank in ranks:
                rank.kill()
        time.sleep(0.002)
    for rank in ranks:
        rank.join()
        with suppress(ProcessLookupError):  # what a rank that was killed leaves: its loader's workers
            os.killpg(rank.pid, signal.SIGKILL)
    ended.codes = [int(rank.exitcode or 0) for rank in ranks]
    ended.printed = [output.read_text(errors="replace") for output in outputs]
    for output in outputs:
        output.unlink()
    return ended


def interrupt(name: str, pids: list[int], draw: random.Random) -> None:
    """Do what an interruption of this name does to the ranks with these process ids."""
    one = [draw.choice(pids)] if pids else []
    if name in SIGNALS:
        signal_all(pids if "all" in name else one, SIGNALS[name])
    elif name == "kill -9 of a loader worker":
        workers = [int(child) for pid in one for child in children(pid)]
        signal_all(workers or pids, signal.SIGKILL)
    else:
        if name.startswith("SIGTERM"):
            signal_all(pids, signal.SIGTERM)
            time.sleep(draw.uniform(0, 0.3))
        signal_all(one if "one" in name else pids, signal.SIGKILL)


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def _rank(rank: int, words: list[str], environment: dict[str, str], count: Any, output: Path) -> None:
    """`infini-train fit` as one rank, in a process forked from one that has imported everything."""
    os.setsid()  # so that the process group of this number is that of the rank and its children
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a rank that was not forked
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    import torch
    from lightning_utilities.core.rank_zero import rank_zero_only

    from infini_train import commands

    rank_zero_only.rank = rank  # was found when it was imported
    torch.set_num_threads(1)

    def instant() -> None:
        count.value += 1

    if rank == 0:
        watch_calls(instant)
    sys.argv = ["infini-train", *words]
    commands.main()


def faulty_system(directory: Path) -> Path | None:
    """Compile faulty_system.c; None if there is no compiler."""
    library = directory / "faulty_system.so"
    source = Path(__file__).with_name("faulty_system.c")
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library
