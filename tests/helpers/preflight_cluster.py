"""launch/preflight.py on pretended nodes, one process for each rank."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.helpers.datasets import make_dataset

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "model": {"vocab_size": 100, "optimizer": {"name": "adamw"}},
    "data": {"train": "train", "validation": "train", "segment_length": 8},
    "trainer": {"accelerator": "cpu"},
    "checkpoint": {"keep_last": 2},
    "run": "run",
}
CHECKPOINT = Path("checkpoints/step-00000003/COMPLETE")  # training.checkpoint's names, see test_room


class Ended(NamedTuple):
    """Exit codes by rank; what rank 0 wrote."""

    codes: list[int]
    out: str
    err: str


class Cluster:
    """Every rank's working directory, with links to what nodes share: `train`, `run`, config.yaml."""

    def __init__(self, root: Path, nodes: list[str]):
        self.root, self.nodes, self.run = root, nodes, root / "run"
        make_dataset(root / "train", [20] * 15, per_shard=3)
        (self.run / CHECKPOINT).parent.mkdir(parents=True)
        (self.run / CHECKPOINT).write_text('{"state": 1000}')
        (root / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        for rank in range(len(nodes)):
            self.of(rank).mkdir()
            for name in ("train", "run", "config.yaml"):
                (self.of(rank) / name).symlink_to(root / name)

    def of(self, rank: int) -> Path:
        return self.root / f"rank-{rank}"

    def start(self, rank: int, plant: str = "", port: int = 0, **env: str) -> subprocess.Popen:
        """`plant`: Python that runs first."""
        script = f"import sys\n{plant}\nsys.path.append({str(ROOT)!r})\n"
        script += "from infini_train.commands import main\nmain()"
        place = {"RANK": rank, "WORLD_SIZE": len(self.nodes), "LOCAL_RANK": self.nodes[:rank].count(self.nodes[rank])}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or free_port(), "OMP_NUM_THREADS": 1}
        options = ["--config", "config.yaml", "--timeout", env.pop("timeout", "60")]
        return subprocess.Popen(
            [sys.executable, "-c", script, "preflight", *options],
            env={**os.environ, "SLURMD_NODENAME": self.nodes[rank], **{k: str(v) for k, v in place.items()}, **env},
            cwd=self.of(rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def preflight(self, plants: dict[int, str] | None = None, envs: dict[int, dict[str, str]] | None = None) -> Ended:
        plants, envs, port = plants or {}, envs or {}, free_port()
        ranks = range(len(self.nodes))
        return ended([self.start(r, plants.get(r, ""), port, **envs.get(r, {})) for r in ranks])

    def left(self) -> list[str]:
        """What lies in the run's directory now and should not."""
        return [p.name for p in self.run.iterdir() if p.name != "checkpoints"]


def ended(processes: list[subprocess.Popen], timeout: float = 90) -> Ended:
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return Ended([process.returncode for process in processes], *texts[0])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def faults(end: Ended) -> list[str]:
    lines = end.err.splitlines()
    assert all(line.startswith("preflight: ") for line in lines), end.err
    return [line for line in lines if not line.startswith("preflight: warning: ")]
