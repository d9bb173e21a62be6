"""Measuring on a machine that is never quite quiet: jobs take turns, medians are kept; memory in its own process."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def interleaved(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each job over rounds in which every job runs once, after one round that counts nowhere."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


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
