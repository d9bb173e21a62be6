"""`infini-train` on several ranks, one with a fault: FAULT=RANK,KIND,WHEN python -m tests.helpers.job ARGS..."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.runs import arguments

# The same rates in a run of 9 steps and one of 20, but what follows step 9: 0.1 of the peak if the run ends there.
CONSTANT = ["--model.optimizer.schedule", "wsd", "--model.optimizer.decay_steps", "0"]
LANES = 4


class Job(NamedTuple):
    """Exit code, what was written to stderr, instants that the faulty rank passed, seconds."""

    code: int
    err: str
    instants: int
    seconds: float


def run(
    directory: Path,
    dataset: Path,
    ranks: int,
    strategy: str | None = None,
    *extra: str,
    accumulate: int = 1,
    fault: tuple[int, str, int] = (0, "none", 0),
    timeout: float = 150,
) -> Job:
    """Train on `ranks` local processes over gloo; the same lanes whatever their number."""
    words = [*arguments(directory, dataset), "--trainer.devices", str(ranks), *CONSTANT]
    words += ["--trainer.accumulate_grad_batches", str(accumulate)]
    words += ["--data.micro_batch_size", str(LANES // ranks // accumulate)]
    words += ["--trainer.strategy", strategy] if strategy else []
    words += ["--trainer.limit_val_batches", "0"]
    command = [sys.executable, "-m", "tests.helpers.job", *words, *extra]
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FAULT": ",".join(map(str, fault))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        err = process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"the job hangs:\n{process.communicate()[1][-3000:]}") from None
    seconds = time.monotonic() - begin
    passed = re.findall(r"instants passed: (\d+)", err)
    return Job(process.returncode, err, int(passed[-1]) if passed else 0, seconds)


def plant(fault: str, when: int) -> None:
    """Make this rank misbehave at its `when`-th training step or, for `kill`, instant."""
    import torch

    from infini_train.training import checkpoint, checkpoint_directory, checkpoint_format, module

    count = {"instants": 0, "steps": 0, "saves": 0}

    def around(owner: Any, name: str, before: Callable[[], None], after: Callable[[Any], Any]) -> None:
        right = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before()
            return after(right(*args, **kwargs))

        setattr(owner, name, wrapped)

    def instant() -> None:
        count["instants"] += 1
        if fault == "kill" and count["instants"] == when:
            os.kill(os.getpid(), signal.SIGKILL)

    def instant_after(result: Any) -> Any:
        instant()
        return result

    def step() -> None:
        count["steps"] += 1
        if count["steps"] == when and fault == "raise":
            raise RuntimeError("planted")
        if count["steps"] == when and fault == "hang":
            time.sleep(1000)

    def loss(result: torch.Tensor) -> torch.Tensor:
        return result * float("nan") if fault == "nan" and count["steps"] == when else result

    def save() -> None:
        count["saves"] += 1
        if fault == "disk full" and count["saves"] == when:
            raise OSError(28, "No space left on device")

    around(module.InfiniModule, "training_step", step, loss)
    around(checkpoint_format, "save_file", save, lambda result: result)
    for owner, name in (
        (module.InfiniModule, "training_step"),
        (torch.optim.AdamW, "step"),
        (torch, "save"),
        (checkpoint_format, "save_file"),
        (checkpoint.Checkpointer, "save"),
        (checkpoint_directory.CheckpointDirectory, "commit"),
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
    ):
        around(owner, name, instant, instant_after)
    import atexit

    atexit.register(lambda: print(f"instants passed: {count['instants']}", file=sys.stderr, flush=True))


def main() -> None:
    import torch

    from infini_train import commands

    torch.set_num_threads(1)
    rank, fault, when = os.environ["FAULT"].split(",")
    if os.environ.get("LOCAL_RANK", "0") == rank:
        plant(fault, int(when))
    commands.main()


if __name__ == "__main__":
    main()
