"""Measuring on a machine that is never quite quiet: jobs take turns, medians are kept; memory in its own process.

Ratios are medians of each round's: within a run a virtual machine's speed can change by half, seldom within a round.
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
    """Seconds of each job in rounds in which every job runs once, after one round that counts nowhere."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            seconds[name].append(timed(job))
    return {name: times[1:] for name, times in seconds.items()}


def ratio(seconds: list[float], base: list[float]) -> float:
    """Median over the rounds of `interleaved` of one job's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def status_mib(field: str) -> float:
    """Of this process: VmRSS, what is resident now, or VmHWM, its peak (ru_maxrss begins at what the parent held)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def growth_mib(job: Callable[[], object]) -> float:
    """By how much the peak of this process, once the job is done, is above what it holds before."""
    before = status_mib("VmRSS")
    job()
    return status_mib("VmHWM") - before


def child(module: str, *words: object, **environment: str) -> Any:
    """What `python -m benchmarks.MODULE WORDS...` prints last, JSON, from a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    return json.loads(done.stdout.splitlines()[-1])
