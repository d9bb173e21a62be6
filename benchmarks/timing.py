"""Measuring on a machine that is never quite quiet: jobs take turns, medians are kept; memory in its own process."""

import json
import os
import resource
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


def resident_kib() -> int:
    """What this process holds now."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1])


def growth_mib(job: Callable[[], object], before_kib: int) -> float:
    """By how much the peak of this process, once the job is done, is above `before_kib`."""
    job()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024


def child(module: str, *words: object, **environment: str) -> Any:
    """What `python -m benchmarks.MODULE WORDS...` prints last, JSON, from a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    return json.loads(done.stdout.splitlines()[-1])
