"""Timing on a machine that is never quite quiet, and memory measured in a process of its own.

Jobs take turns, and medians are reported. A ratio is the median of the ratios of the rounds, because the speed of a
virtual machine can change by half within a run, but seldom within a round.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def timed(job: Callable[[], object]) -> float:
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


def interleaved(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job, in rounds in which every job runs once. A first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            seconds[name].append(timed(job))
    return {name: times[1:] for name, times in seconds.items()}


def ratio(seconds: list[float], base: list[float]) -> float:
    """The median, over the rounds of `interleaved`, of one job's time divided by another's."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def status_mib(field: str) -> float:
    """Memory of this process in MiB: VmRSS, what is resident now, or VmHWM, its peak.

    ru_maxrss would begin at what the parent process held.
    """
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, such as "model name"; "unknown" without it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "unknown")


def growth_mib(job: Callable[[], object]) -> float:
    """The peak of this process after a job minus what it held before, in MiB."""
    before = status_mib("VmRSS")
    job()
    return status_mib("VmHWM") - before


def child(module: str, *words: object, **environment: str) -> Any:
    """The last line, JSON, that `python -m benchmarks.MODULE WORDS...` prints in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    return json.loads(done.stdout.splitlines()[-1])
