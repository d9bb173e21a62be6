"""A real SLURM of two nodes on this machine; tests/slurm/down.sh ends it."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def wait_until(condition: Callable[[], object], what: str, timeout: float) -> None:
    """Poll; AssertionError that says what did not come true."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout:g} s"
        time.sleep(0.25)


class Cluster:
    """Commands of the running cluster."""

    def __init__(self) -> None:
        self.up()

    def up(self) -> None:
        """Start it, or repair it: boot nodes that crashed."""
        done = subprocess.run([HERE / "up.sh"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.environ["SLURM_CONF"] = done.stdout.strip().removeprefix("export SLURM_CONF=")

    def crash(self, node: str) -> None:
        """Cut the power of a node."""
        subprocess.run([HERE / "down.sh", "--crash", node], check=True)

    def run(self, *command: str | Path, **env: str | Path) -> str:
        """Standard output of a command that must succeed."""
        words = [str(word) for word in command]
        variables = {**os.environ, **{name: str(value) for name, value in env.items()}}
        done = subprocess.run(words, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def show(self, job: str, field: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{field}=(\S+)", self.run("scontrol", "-o", "show", "job", job))
        assert found is not None
        return found[1]

    def state(self, job: str) -> str:
        return self.show(job, "JobState")

    def wait(self, job: str, timeout: float) -> str:
        """The state in which a job ends."""
        ended = "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"
        wait_until(lambda: self.state(job) in ended, f"end of job {job} (now {self.state(job)})", timeout)
        return self.state(job)
