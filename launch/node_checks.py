"""What a rank finds out about itself and, with its neighbours, about the network. Used by preflight.py.

Every function raises ValueError or OSError for what is wrong.
"""

import hashlib
import json
import os
import random
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml

from infini_train import preemption
from infini_train.data.index import DatasetIndex, sha256_of_file

SAMPLE_BYTES, SAMPLE_SECONDS = 2**28, 10.0  # of shards that a rank reads of each dataset; one in any case
VISIBLE_SECONDS = 5.0  # within which a new file shows on all nodes
SUMS = 3  # timed, after one that makes the connections
SUM_BYTES = {"nccl": 2**26, "gloo": 2**22}
TOKEN = ".preflight-"  # how the name of rank 0's file in the run's directory begins
NEEDED = ("data.train", "data.validation", "data.segment_length", "trainer.accelerator", "model.optimizer")
NEEDED += ("checkpoint.keep_last",)


class Place(NamedTuple):
    """Where a process stands."""

    rank: int
    world_size: int
    local_rank: int
    node: str


def code() -> str:
    root, digest = Path(preemption.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {sha256_of_file(path)}\n".encode())
    return digest.hexdigest()[:12]


def read_config(path: Path) -> dict[str, Any]:
    """A resolved configuration. Raises ValueError or OSError if it is none."""
    try:
        config = yaml.safe_load(path.read_text())
        missing = [f"{a}.{b}" for a, b in NEEDED if b not in config[a]] + ["run"] * ("run" not in config)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: found no resolved configuration ({type(error).__name__}: {error})") from error
    if missing:
        raise ValueError(f"{path}: found no {', '.join(missing)}; expected what `fit --print_config` writes")
    return config


def device(accelerator: str, place: Place) -> tuple[str, str, list[str]]:
    """Name of this rank's device, backend for its collectives, warnings. Raises ValueError if it does not work."""
    gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    name, backend, warnings = "cpu", "gloo", []
    if gpu:
        if (found := torch.cuda.device_count()) <= place.local_rank:
            raise ValueError(f"found {found} GPUs, expected one for local rank {place.local_rank}")
        torch.cuda.set_device(place.local_rank)
        name, backend = torch.cuda.get_device_name(), "nccl"
        free, total = torch.cuda.mem_get_info()
        if free < 0.9 * total:
            warnings = [f"device: {free / 1e9:.1f} of {total / 1e9:.1f} GB free: some other process holds the rest"]
    # Small whole numbers, whose sums are exact in float32 (and TF32) in any order.
    a, b = torch.randint(-8, 9, (2, 512, 512), generator=torch.Generator().manual_seed(place.rank)).double()
    product = (a.float().to(tensor_device(backend)) @ b.float().to(tensor_device(backend))).cpu()
    if wrong := int((product != (a @ b).float()).sum()):
        raise ValueError(f"{name} found {wrong:,} of {product.numel():,} entries of a matrix product wrong")
    return name, backend, warnings


def tensor_device(backend: str) -> str:
    return "cuda" if backend == "nccl" else "cpu"


def sample(index: DatasetIndex, place: Place) -> list[int]:
    """Read shards which other ranks do not, others in each job; their numbers. Raises ValueError for a wrong one."""
    seed = f"{os.environ.get('SLURM_JOB_ID')} {os.environ.get('SLURM_RESTART_COUNT')}"
    order = random.Random(seed).sample(range(len(index.shards)), len(index.shards))
    end, size, read = time.monotonic() + SAMPLE_SECONDS, 0, list[int]()
    for number in order[place.rank :: place.world_size] or [order[place.rank % len(order)]]:
        shard = index.shards[number]
        size += shard.bytes
        if read and (size > SAMPLE_BYTES or time.monotonic() > end):
            break
        if (found := sha256_of_file(index.root / shard.name)) != shard.sha256:
            path = index.root / shard.name
            raise ValueError(f"shard {path}: sha256 found {found[:12]}..., expected {shard.sha256[:12]}...")
        read.append(number)
    return read


def leave_token(run: Path) -> tuple[str, str]:
    """A file in the run's directory, and what it holds; who calls this removes it."""
    run.mkdir(parents=True, exist_ok=True)
    for old in run.glob(f"{TOKEN}*"):
        if time.time() - old.stat().st_mtime > 3600:  # of a preflight that SIGKILL ended
            old.unlink(missing_ok=True)
    path, content = run / f"{TOKEN}{uuid.uuid4().hex}", uuid.uuid4().hex
    path.write_text(content)
    return str(path), content


def see_token(path: str, content: str) -> None:
    """Raises ValueError unless this node sees the file that rank 0 has made."""
    end = time.monotonic() + VISIBLE_SECONDS
    while not Path(path).exists() and time.monotonic() < end:
        time.sleep(0.1)
    if not Path(path).exists() or Path(path).read_text() != content:
        raise ValueError(f"{Path(path).parent}: found no file that rank 0 has just made there, expected one shared disk")


def write(run: Path) -> int:
    """Bytes free for the run's directory. Raises OSError unless this node can write there."""
    with tempfile.TemporaryFile(dir=run) as file:
        file.write(bytes(2**16))
        file.flush()
        os.fsync(file.fileno())
    return shutil.disk_usage(run).free


def room(run: Path, config: dict[str, Any], free: int, warnings: list[str]) -> None:
    """Raises ValueError if not even the next checkpoint fits; warns if not all that are kept will fit."""
    # The names are training.checkpoint's; importing it takes seconds, so only a run's first start does.
    whole = sorted((run / "checkpoints").glob("step-*[0-9]/COMPLETE"))
    if whole:
        size, of = sum(json.loads(whole[-1].read_text()).values()), f"as {whole[-1].parent.name}"
    else:
        from infini_train.model.flops import parameters
        from infini_train.training.module import InfiniModule

        options = config["model"]["optimizer"]
        model = InfiniModule(**{**config["model"], "optimizer": None}).config
        tensors = 1 if options and options["name"] == "sgd" else 3  # float32: weights, Adam's two moments
        size, of = 4 * tensors * parameters(model), f"{4 * tensors} bytes for each of {parameters(model):,} parameters"
    more = max(config["checkpoint"]["keep_last"] + 1 - len(whole), 1)  # one more than is kept, while it is written
    text = f"{run}: found {free / 1e9:.2f} GB free, expected at least {size / 1e9:.2f} GB for a checkpoint ({of})"
    if free < size:
        raise ValueError(text)
    if free < more * size:
        warnings.append(f"run directory: {text}, {more * size / 1e9:.2f} GB for the {more} to come")


# --- sums over ranks


def ring(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbouring nodes, in rounds in which no node has two."""
    edges = [(i, (i + 1) % nodes) for i in range(nodes if nodes > 2 else nodes - 1)]
    even = nodes - nodes % 2
    return [edges[0:even:2], edges[1:even:2], edges[even:]] if nodes > 2 else [edges]


def measure(
    place: Place, nodes: list[list[int]], backend: str, store: dist.Store, timeout: float, at: Callable[[str], None]
) -> dict[str, float | None]:
    """Bus bandwidths in bytes a second that this rank sees; None where there is nobody to talk to.

    Args:
        nodes: the ranks of each node.
        at: is told what comes next.

    `within` the node; `neighbours`: the better of the two, so that a slow node does not make its neighbours look so;
    `all`. Raises ValueError for a wrong sum, RuntimeError for a failed or late one.
    """
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=limit)
    found: dict[str, list[float]] = {"within": [], "neighbours": [], "all": []}

    def summed(kind: str, ranks: list[int], what: str) -> None:
        at(f"sum over {what}")
        group = dist.new_group(ranks, limit, use_local_synchronization=True) if kind != "all" else None
        found[kind].append(bus_bandwidth(ranks, place.rank, backend, group))

    try:
        mine = next(i for i, ranks in enumerate(nodes) if place.rank in ranks)
        if len(nodes[mine]) > 1:
            summed("within", nodes[mine], f"node {place.node}")
        for edges in ring(len(nodes)):
            dist.barrier()  # so that no pair is timed while another kind of sum goes on
            for a, b in edges:
                if mine in (a, b):
                    summed("neighbours", sorted(nodes[a] + nodes[b]), f"the nodes of ranks {nodes[a][0]}, {nodes[b][0]}")
        summed("all", list(range(place.world_size)), "all ranks")
        return {kind: max(values, default=None) for kind, values in found.items()}
    finally:
        dist.destroy_process_group()


def bus_bandwidth(ranks: list[int], rank: int, backend: str, group: dist.ProcessGroup | None) -> float:
    """2 (n - 1) / n x bytes / median time of an all-reduce. Raises ValueError if its result is wrong."""
    numbers = torch.arange(SUM_BYTES[backend] // 4, device=tensor_device(backend), dtype=torch.float32) % 64
    expected, times = numbers * len(ranks) + sum(ranks), []
    for _ in range(1 + SUMS):
        x = numbers + rank
        dist.barrier(group)
        synchronize(backend)
        begin = time.perf_counter()
        dist.all_reduce(x, group=group)
        synchronize(backend)
        times.append(time.perf_counter() - begin)
        if wrong := int((x != expected).sum()):
            raise ValueError(f"{wrong:,} of {x.numel():,} entries wrong")
    return 2 * (len(ranks) - 1) / len(ranks) * SUM_BYTES[backend] / statistics.median(times[1:])


def synchronize(backend: str) -> None:
    if backend == "nccl":
        torch.cuda.synchronize()
