"""How the ranks of a preflight exchange messages: through a key-value store, because any rank may be missing."""

import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist


class RankLocation(NamedTuple):
    """A process's ranks and its node."""

    rank: int  # global
    world_size: int
    local_rank: int
    node: str

    @classmethod
    def here(cls) -> "RankLocation":
        """Read torchrun's variables, or else SLURM's. Without either this process is the only one."""
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
            if all(name in os.environ for name in names):
                rank, world_size, local_rank = (int(os.environ[name]) for name in names)
                return cls(rank, world_size, local_rank, node)
        return cls(0, 1, 0, node)

    def __str__(self) -> str:
        return f"node {self.node}, global rank {self.rank}"


class Board:
    """Messages between ranks, as JSON values in a store that rank 0 (or torchrun) hosts."""

    def __init__(self, location: RankLocation, timeout: float):
        """Raises ConnectionError unless there is a store at MASTER_ADDR:MASTER_PORT within `timeout` seconds."""
        alone, theirs = location.world_size == 1, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        holds = alone or (location.rank == 0 and not theirs)
        try:
            host, port = ("127.0.0.1", 0) if alone else (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            store = dist.TCPStore(host, port, None, holds, timedelta(seconds=timeout), wait_for_workers=False)
        except KeyError as error:
            raise ConnectionError(f"{error} is not set, expected where rank 0 listens") from error
        except dist.DistError as error:
            what = "cannot listen at" if holds else "found no rank 0 at"
            raise ConnectionError(f"{what} {host}:{port}: {' '.join(str(error).split())}") from error
        self.store = dist.PrefixStore(f"preflight-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.location, self.step = location, ""
        self.token: Path | None = None  # the file that rank 0 creates in the run's directory
        self.at("start")

    def post(self, key: str, value: Any) -> None:
        """Write a value under a key."""
        self.store.set(key, json.dumps(value))

    def at(self, step: str) -> None:
        """Announce this rank's next step, which is reported if the rank then dies or hangs."""
        self.step = step
        self.post(f"at/{self.location.rank}", [self.location.node, step])

    def read(self, key: str, seconds: float) -> Any:
        """Wait for a key, in short waits so that signals are handled. Raises dist.DistError if it does not appear."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.store.wait([key], timedelta(seconds=min(seconds, 1)))
                return json.loads(self.store.get(key))
            except dist.DistStoreError:
                if time.monotonic() > end:
                    raise

    def gather(self, kind: str, end: float) -> dict[int, Any]:
        """Read `kind/RANK` of all ranks, in order, or of those ranks that have posted it at the time `end`."""
        found: dict[int, Any] = {}
        while True:
            for rank in range(self.location.world_size):
                if rank not in found and self.store.check([key := f"{kind}/{rank}"]):
                    found[rank] = json.loads(self.store.get(key))
            if len(found) == self.location.world_size or time.monotonic() > end:
                return dict(sorted(found.items()))
            time.sleep(0.02)
