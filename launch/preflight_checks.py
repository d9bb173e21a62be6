"""The checks of a preflight: of one rank, and of the network between ranks.

A function raises ValueError or OSError for what is wrong.
"""

import hashlib
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from infini_train import preemption
from infini_train.data.index import DatasetIndex
from infini_train.data.remote import reader_of
from infini_train.files import sha256_of_file
from infini_train.run_files import CHECKPOINTS, complete, files_of
from launch.preflight_board import RankLocation

SAMPLE_BYTES, SAMPLE_SECONDS = 2**28, 10.0  # limits to what a rank reads of a dataset; it reads one shard at least
VISIBLE_SECONDS = 5.0  # within which a new file must appear on all nodes
SUMS = 3  # timed sums, after one that makes the connections
SUM_BYTES = {"nccl": 2**26, "gloo": 2**22}
TOKEN = ".preflight-"  # prefix of the name of rank 0's file in the run's directory
NEEDED = (
    *("data.train", "data.validation", "data.segment_length", "trainer.accelerator"),
    *("model.optimizer", "checkpoint.keep_last"),
)


def code() -> str:
    """Return a digest of the source files of infini_train."""
    root, digest = Path(preemption.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {sha256_of_file(path)}\n".encode())
    return digest.hexdigest()[:12]


def read_config(path: Path) -> dict[str, Any]:
    """Read a resolved configuration. Raises ValueError for a file that is none."""
    try:
        config = yaml.safe_load(path.read_text())
        missing = [f"{a}.{b}" for a, b in (name.split(".") for name in NEEDED) if b not in (config.get(a) or {})]
        missing += [] if "run" in config else ["run"]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: found no configuration: {type(error).__name__}: {error}") from error
    if missing:
        raise ValueError(f"{path}: found no {', '.join(missing)}; expected what `fit --print_config` writes")
    return config


def device(accelerator: str, location: RankLocation, warnings: list[str]) -> tuple[str, str]:
    """Check this rank's device, and return its name and the backend of its collectives."""
    name, backend = "cpu", "gloo"
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        if (found := torch.cuda.device_count()) <= location.local_rank:
            raise ValueError(f"found {found} GPUs, expected one for local rank {location.local_rank}")
        torch.cuda.set_device(location.local_rank)
        name, backend = torch.cuda.get_device_name(), "nccl"
        free, total = torch.cuda.mem_get_info()
        if free < 0.9 * total:
            warnings.append(f"device: {free / 1e9:.1f} of {total / 1e9:.1f} GB free, something else holds the rest")
    # Sums of small integers are exact in float32 and TF32, in any order.
    a, b = torch.randint(-8, 9, (2, 512, 512), generator=torch.Generator().manual_seed(location.rank)).double()
    product = (a.float().to(device_type(backend)) @ b.float().to(device_type(backend))).cpu()
    if wrong := int((product != a @ b).sum()):
        raise ValueError(f"{name}: {wrong:,} of {product.numel():,} entries of a matrix product are wrong")
    return name, backend


def device_type(backend: str) -> str:
    """Return the type of the devices of a backend."""
    return "cuda" if backend == "nccl" else "cpu"


def sample(index: DatasetIndex, location: RankLocation) -> list[int]:
    """Check a random sample of shards, different ones on each rank and in each job, and return their numbers."""
    seed = f"{os.environ.get('SLURM_JOB_ID')} {os.environ.get('SLURM_RESTART_COUNT')}"
    order = random.Random(seed).sample(range(len(index.shards)), len(index.shards))
    end, size, read = time.monotonic() + SAMPLE_SECONDS, 0, list[int]()
    for number in order[location.rank :: location.world_size] or [order[location.rank % len(order)]]:
        shard = index.shards[number]
        if index.remote:  # the reader checks the digest of the block that it reads
            reader_of(index).read(int((index.shard_D == number).argmax()), 0, 1)
            return [number]
        size += shard.bytes
        if read and (size > SAMPLE_BYTES or time.monotonic() > end):
            break
        if (found := sha256_of_file(index.root / shard.name)) != shard.sha256:
            path = index.root / shard.name
            raise ValueError(f"shard {path}: sha256 found {found[:12]}..., expected {shard.sha256[:12]}...")
        read.append(number)
    return read


def leave_token(path: Path, content: str) -> bool:
    """Create the file, and the run's directory if needed, and return True. The caller removes the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{TOKEN}*"):
        if time.time() - old.stat().st_mtime > 3600:  # left by a preflight that was killed
            old.unlink(missing_ok=True)
    path.write_text(content)
    return True


def see_token(path: Path, content: str) -> bool:
    """Return True if this node sees the file that rank 0 has created; raises ValueError otherwise."""
    end = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise ValueError(f"{path.parent}: found no file that rank 0 has made there, expected a shared disk")
        time.sleep(0.1)
    if (found := path.read_text()) != content:
        raise ValueError(f"{path}: found {found!r}, expected {content!r} that rank 0 has written there")
    return True


def write(run: Path) -> int:
    """Return the free bytes of the run's disk. Raises OSError unless this node can write there."""
    with tempfile.TemporaryFile(dir=run) as file:
        file.write(bytes(2**16))
        file.flush()
        os.fsync(file.fileno())
    return shutil.disk_usage(run).free


def room(run: Path, config: dict[str, Any], free: int, warnings: list[str]) -> None:
    """Raise ValueError if the next checkpoint does not fit, and warn if not all checkpoints to be kept will fit."""
    # The sizes of an existing checkpoint are used, because importing the model takes seconds.
    whole = complete(run / CHECKPOINTS)
    if whole:
        size, of = sum(sums["size"] for sums in files_of(whole[-1]).values()), f"as {whole[-1].name}"
    else:
        from infini_train.model.flops import parameters
        from infini_train.training.module import InfiniModule

        options = config["model"]["optimizer"]
        given = {**config["model"], "optimizer": None, "segment_length": config["data"]["segment_length"]}
        model = InfiniModule(**given).config
        options = options or {"name": "adamw"}
        tensors = 1 if options["name"] == "sgd" else 3  # in float32: the weights and Adam's two moments
        tensors += options.get("ema_decay") is not None
        size = 4 * tensors * parameters(model)
        of = f"{4 * tensors} bytes for each of {parameters(model):,} parameters"
    kept = config["checkpoint"]["keep_last"] + (config["checkpoint"].get("best") is not None)
    more = max(kept + 1 - len(whole), 1)  # the newest is written before the oldest is removed
    text = f"{run}: found {free / 1e9:.2f} GB free, expected at least {size / 1e9:.2f} GB for a checkpoint ({of})"
    if free < size:
        raise ValueError(text)
    if free < more * size:
        warnings.append(f"room: {text}, {more * size / 1e9:.2f} GB for the {more} to come")


# --- sums over ranks


def ring(nodes: int) -> list[list[tuple[int, int]]]:
    """Return pairs of neighbouring nodes, in rounds in which every node has at most one neighbour."""
    edges = [(i, (i + 1) % nodes) for i in range(nodes if nodes > 2 else nodes - 1)]
    even = nodes - nodes % 2
    return [edges[0:even:2], edges[1:even:2], edges[even:]] if nodes > 2 else [edges]


def measure(
    location: RankLocation,
    nodes: list[list[int]],
    backend: str,
    store: dist.Store,
    timeout: float,
    at: Callable[[str], None],
) -> dict[str, Any]:
    """Check and time sums within the node, with each neighbouring node, and over all ranks.

    Args:
        location: this rank.
        nodes: the ranks of each node.
        backend: nccl or gloo.
        store: for the rendezvous of the process groups.
        timeout: limit of one sum, in seconds.
        at: called with a description of the next step.

    Returns:
        Bus bandwidths in bytes per second: `within`, `neighbours` (the better of the two, because a slow node makes
        one sum of each neighbour slow) and `all`, or None where there are no other ranks; `wrong`, the sums with a
        wrong result; `right`, the number of correct sums among those smaller than `all`.

    Raises:
        RuntimeError: for a sum that fails or takes too long.
    """
    limit = timedelta(seconds=timeout)
    found: dict[str, list[float]] = {"within": [], "neighbours": [], "all": []}
    wrong, right = list[str](), 0

    def meet(name: str, count: int) -> None:
        at(f"{name}: waiting for the others")
        if store.add(f"{name}/arrived", 1) == count:
            store.set(f"{name}/all", "")
        store.wait([f"{name}/all"], limit)

    def add(kind: str, ranks: list[int], name: str) -> None:
        nonlocal right
        at(name)
        here, own = ranks.index(location.rank), dist.PrefixStore(name, store)
        # Each sum gets a default group of its own: new_group would be a collective of all ranks.
        gpu = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
        dist.init_process_group(backend, None, limit, len(ranks), here, own, device_id=gpu)
        bandwidth, mistakes = bus_bandwidth(ranks, location.rank, backend)
        meet(name, len(ranks))  # so that no rank closes connections that another rank still needs
        dist.destroy_process_group()
        found[kind].append(bandwidth)
        if mistakes:
            wrong.append(f"{name}: {mistakes:,} entries wrong")
        elif kind != "all":
            right += 1

    mine = next(i for i, ranks in enumerate(nodes) if location.rank in ranks)
    if len(nodes[mine]) > 1:
        add("within", nodes[mine], f"sum over the ranks of node {location.node}")
    for number, edges in enumerate(ring(len(nodes))):
        meet(
            f"sums over neighbours, round {number}", location.world_size
        )  # so that no pair is timed during other sums
        for a, b in edges:
            if mine in (a, b):
                pair = f"sum over the nodes of ranks {nodes[a][0]}, {nodes[b][0]}"
                add("neighbours", sorted(nodes[a] + nodes[b]), pair)
    meet("sums over all ranks", location.world_size)
    add("all", list(range(location.world_size)), "sum over all ranks")
    return {kind: max(values, default=None) for kind, values in found.items()} | {"wrong": wrong, "right": right}


def bus_bandwidth(ranks: list[int], rank: int, backend: str) -> tuple[float, int]:
    """Return an all-reduce's 2 (n - 1) / n x bytes / median seconds, and the wrong entries in its results."""
    numbers = torch.arange(SUM_BYTES[backend] // 4, device=device_type(backend), dtype=torch.float32) % 64
    expected = numbers * len(ranks) + sum(ranks)  # exact in float32 for up to 5,000 ranks
    times, wrong = [], 0
    for _ in range(1 + SUMS):
        x = numbers + rank
        dist.barrier()
        synchronize(backend)
        begin = time.perf_counter()
        dist.all_reduce(x)
        synchronize(backend)
        times.append(time.perf_counter() - begin)
        wrong += int((x != expected).sum())
    return 2 * (len(ranks) - 1) / len(ranks) * SUM_BYTES[backend] / statistics.median(times[1:]), wrong


def synchronize(backend: str) -> None:
    """Wait for the work of this rank's GPU."""
    if backend == "nccl":
        torch.cuda.synchronize()
