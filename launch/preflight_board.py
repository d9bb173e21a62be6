"""What the ranks of a preflight tell one another, through a store and not by collectives: any rank may be missing."""

import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist


class Place(NamedTuple):
    """Where a process stands."""

    rank: int
    world_size: int
    local_rank: int
    node: str

    @classmethod
    def here(cls) -> "Place":
        """By torchrun's variables, else SLURM's; without either this process is alone."""
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
            if all(name in os.environ for name in names):
                rank, world_size, local_rank = (int(os.environ[name]) for name in names)
                return cls(rank, world_size, local_rank, node)
        return cls(0, 1, 0, node)

    def __str__(self) -> str:
        return f"node {self.node}, global rank {self.rank}"


class Board:
    """What ranks tell one another, as JSON under keys of a store which rank 0 (or torchrun) holds."""

    def __init__(self, place: Place, timeout: float):
        """Raises ConnectionError if there is no store at MASTER_ADDR:MASTER_PORT within `timeout` seconds."""
        alone, theirs = place.world_size == 1, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        holds = alone or (place.rank == 0 and not theirs)
        try:
            host, port = ("127.0.0.1", 0) if alone else (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            store = dist.TCPStore(host, port, None, holds, timedelta(seconds=timeout), wait_for_workers=False)
        except KeyError as error:
            raise ConnectionError(f"{error} is not set, expected where rank 0 listens") from error
        except dist.DistError as error:
            what = "cannot listen at" if holds else "found no rank 0 at"
            raise ConnectionError(f"{what} {host}:{port}: {' '.join(str(error).split())}") from error
        self.store = dist.PrefixStore(f"preflight-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.place, self.step = place, ""
        self.token: Path | None = None  # the file that rank 0 makes in the run's directory
        self.at("start")

    def post(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def at(self, step: str) -> None:
        """Say what this rank is about to do, in case that it is the last thing heard of it."""
        self.step = step
        self.post(f"at/{self.place.rank}", [self.place.node, step])

    def read(self, key: str, seconds: float) -> Any:
        """Wait for a key, in slices so that signals are noticed. Raises dist.DistError if it does not come."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.store.wait([key], timedelta(seconds=min(seconds, 1)))
                return json.loads(self.store.get(key))
            except dist.DistStoreError:
                if time.monotonic() > end:
                    raise

    def gather(self, kind: str, end: float) -> dict[int, Any]:
        """`kind/RANK` of all ranks, in order; only of those that have posted it when the clock shows `end`."""
        found: dict[int, Any] = {}
        while True:
            for rank in range(self.place.world_size):
                if rank not in found and self.store.check([key := f"{kind}/{rank}"]):
                    found[rank] = json.loads(self.store.get(key))
            if len(found) == self.place.world_size or time.monotonic() > end:
                return dict(sorted(found.items()))
            time.sleep(0.02)
