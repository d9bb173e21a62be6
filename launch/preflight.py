"""Examine every rank before training, and name the node that is at fault.

    srun --kill-on-bad-exit=1 python launch/preflight.py --config RESOLVED.yaml     (or torchrun, or one process)

Every rank examines itself: device, index and shards (a random sample, by checksum), run directory, versions, code.
Ranks report through a key-value store on rank 0's node, by no collective, so that one that never comes is named. Only
if all are well, sums over the ranks of a node, of two neighbouring nodes and of all are checked and timed.

Exit code 0: all are well (slowness is only warned of); 1: some rank is not; 2: rank 0 cannot read the configuration.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # its errors are raised too, without ten lines of C++ frames
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a sum that takes too long raises, instead of aborting

import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from rich.table import Table

from infini_train import preemption
from infini_train.data.index import DatasetIndex, sha256_of_file

PACKAGES = ("torch", "deepspeed", "lightning", "transformers", "numpy")
SAMPLE_BYTES, SAMPLE_SECONDS = 2**28, 10.0  # of shards a rank reads, from each dataset; but one in any case
CLOCK_TOLERANCE = 5.0  # seconds
VISIBLE_SECONDS = 5.0  # within which a new file shows on all nodes
SUMS = 3  # timed, after one that makes connections
NEEDED = (("data", "train"), ("data", "validation"), ("trainer", "accelerator"), ("checkpoint", "keep_last"))
TOKEN = ".preflight-"  # how the name of rank 0's file in the run's directory begins
Faults = dict[int, list[str]]  # of ranks


class Place(NamedTuple):
    """Where this process stands. torchrun's variables go before SLURM's; with neither it is alone."""

    rank: int
    world_size: int
    local_rank: int
    node: str

    @classmethod
    def here(cls) -> "Place":
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
            if all(name in os.environ for name in names):
                rank, world_size, local_rank = (int(os.environ[name]) for name in names)
                return cls(rank, world_size, local_rank, node)
        return cls(0, 1, 0, node)


class Board:
    """What ranks tell one another, as JSON under keys of a store which rank 0 (or torchrun) holds."""

    def __init__(self, place: Place, timeout: float):
        """Raises dist.DistError if there is no store at MASTER_ADDR:MASTER_PORT within `timeout` seconds."""
        alone, theirs = place.world_size == 1, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.address = "127.0.0.1:0" if alone else f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        host, port = self.address.rsplit(":", 1)
        holds = alone or (place.rank == 0 and not theirs)
        store = dist.TCPStore(host, int(port), None, holds, timedelta(seconds=timeout), wait_for_workers=False)
        self.store = dist.PrefixStore(f"preflight-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.place, self.timeout = place, timeout

    def post(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def at(self, step: str) -> None:
        """Say what this rank is about to do, in case that it is the last thing heard of it."""
        self.step = step
        self.post(f"at/{self.place.rank}", [self.place.node, step])

    def read(self, key: str) -> Any:
        """Wait for a key, in slices so that signals are noticed. Raises dist.DistError: rank 0 has gone or hangs."""
        end = time.monotonic() + 2 * self.timeout + 60  # longer than rank 0 waits for anybody
        while True:
            try:
                self.store.wait([key], timedelta(seconds=1))
                return json.loads(self.store.get(key))
            except dist.DistStoreError:
                if time.monotonic() > end:
                    raise

    def gather(self, kind: str, seconds: float) -> dict[int, Any]:
        """`kind/RANK` of all ranks, in order, or of those that have posted it when time is up."""
        end, found = time.monotonic() + seconds, dict[int, Any]()
        while True:
            for rank in range(self.place.world_size):
                if rank not in found and self.store.check([key := f"{kind}/{rank}"]):
                    found[rank] = json.loads(self.store.get(key))
            if len(found) == self.place.world_size or time.monotonic() > end:
                return dict(sorted(found.items()))
            time.sleep(0.02)


# --- what a rank finds out about itself


def examine(board: Board, options: argparse.Namespace) -> dict[str, Any]:
    """This rank's report. Whatever is raised on the way is a fault in it."""
    place = board.place
    report: dict[str, Any] = {"node": place.node, "faults": [], "warnings": [], "shards": {}, "free": None}
    report["same"] = {"python": platform.python_version(), "sha256 of infini_train's code": code()}

    def check(step: str, function: Callable[..., Any], *arguments: Any) -> Any:
        board.at(step)
        try:
            return function(*arguments)
        except Exception as error:
            kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
            report["faults"].append(f"{step}: {kind}{' '.join(str(error).split())}")

    for package in PACKAGES:
        report["same"][package] = check("versions", version, package)
    config = check("config", read_config, options.config)
    report["config"] = config is not None
    if config is None:
        if place.rank == 0:
            board.post("token", None)
        return report
    report["same"]["sha256 of the config"] = sha256_of_file(options.config)[:12]
    run = options.run or Path(config["run"])
    if place.rank == 0:  # first of all, the others wait for its file
        report["token"] = check("run directory", leave_token, run)
        board.post("token", report["token"])
    found = check("device", device, config["trainer"]["accelerator"], place)
    if found:
        report["device"], report["backend"], slow = found
        report["same"]["device"] = report["backend"] and ("gpu" if report["backend"] == "nccl" else "cpu")
        report["warnings"] += slow
    report["threads"], report["cores"] = torch.get_num_threads(), sorted(os.sched_getaffinity(0))
    for name in ("train", "validation"):
        if (directory := config["data"][name]) is not None:
            step = f"data.{name}"
            index = check(step, DatasetIndex.load, directory)
            if index is not None:
                report["same"][f"fingerprint of {step}"] = index.fingerprint[:12]
                if place.local_rank == 0:  # asks for the size of every shard
                    check(step, index.check_files)
                report["shards"][step] = check(step, sample, index, place), len(index.shards)
    if place.rank != 0 and (token := board.read("token")):
        check("run directory", see_token, *token)
    report["free"] = check("run directory", write, run) if place.rank == 0 or token else None
    if place.rank == 0 and report["free"] is not None:
        check("run directory", room, run, config, report["free"], report["warnings"])
    board.at("finished")
    return report


