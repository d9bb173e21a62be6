"""Rank 0's evaluation of a preflight: which nodes are at fault, and how that is printed."""

import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from launch.preflight_board import Board

CLOCK_TOLERANCE = 5.0  # seconds
UNKNOWN = "?"  # node of a rank that never came
Reports = dict[int, dict[str, Any]]  # by rank
Messages = defaultdict[int, list[str]]  # faults or warnings by rank


def differing(reports: Reports, faults: Messages) -> None:
    """Record values that differ between ranks as faults of the minority; without a majority rank 0 is right."""
    for name in dict.fromkeys(name for report in reports.values() for name in report["same"]):
        found = {rank: str(report["same"][name]) for rank, report in reports.items() if name in report["same"]}
        right, number = Counter(found.values()).most_common(1)[0]
        witness = reports[next(rank for rank in found if found[rank] == right)]["node"]
        for rank, value in found.items():
            if value != right:
                which = f"{right[:12]} as on {number} of {len(found)} ranks (node {witness})"
                faults[rank].append(f"{name}: found {value[:12]}, expected {which}")


def clocks(board: Board, reports: Reports, faults: Messages) -> dict[int, float]:
    """Measure by how many seconds each rank's clock is ahead of rank 0's, and record clocks that are wrong.

    The reference is rank 0's clock, or the median of the nodes where there are three or more.
    """
    ahead, error = {0: 0.0}, {0: 0.0}
    for rank in reports:
        if rank == board.location.rank:
            continue
        begin = time.time()
        board.post(f"turn/{rank}", None)
        try:
            theirs = board.read(f"clock/{rank}", 5)
        except dist.DistStoreError:
            faults[rank].append("clock: no answer within 5 s, though the rank had reported")
            continue
        end = time.time()
        ahead[rank], error[rank] = theirs - (begin + end) / 2, (end - begin) / 2
    nodes = {reports[rank]["node"]: seconds for rank, seconds in ahead.items()}
    right, whose = (statistics.median(nodes.values()), "the nodes' median") if len(nodes) > 2 else (0.0, "rank 0's")
    for rank, seconds in ahead.items():
        if abs(seconds - right) - error[rank] > CLOCK_TOLERANCE:
            limit = f"expected at most {CLOCK_TOLERANCE:.0f} s"
            faults[rank].append(f"clock: found {seconds - right:+.1f} s against {whose}, {limit}")
    return ahead


def threads(nodes: dict[str, list[int]], reports: Reports, warnings: Messages) -> None:
    """Warn of more threads than cores on a CPU, because threads that wait busily slow each other down."""
    for ranks in nodes.values():
        there = [reports[rank] for rank in ranks if rank in reports and reports[rank]["backend"] == "gloo"]
        number, cores = sum(r["threads"] for r in there), len({core for r in there for core in r["cores"]})
        if number > cores:
            warnings[ranks[0]].append(f"{number} threads of all ranks on {cores} cores: lower OMP_NUM_THREADS")


def silent(board: Board, reports: Reports, seconds: float, faults: Messages) -> dict[int, str]:
    """Return the node of every rank, or UNKNOWN, and record ranks that have not reported as being at fault."""
    last = board.gather("at", 0)
    known = {rank: node for rank, (node, _) in last.items()}
    where = slurm_nodes(known) | known
    for rank in sorted(set(range(board.location.world_size)) - set(reports)):
        text = f"not done after {seconds:.0f} s with: {last[rank][1]}" if rank in last else "never came"
        if rank not in where:
            text += f"; nodes that did report: {', '.join(sorted(set(known.values())))}"
        faults[rank].append(text)
    return {rank: where.get(rank, UNKNOWN) for rank in range(board.location.world_size)}


def slurm_nodes(known: dict[int, str]) -> dict[int, str]:
    """Return the nodes of this job step's ranks by SLURM's default order, or nothing if known nodes contradict it."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    try:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        hosts = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (KeyError, OSError, subprocess.SubprocessError):
        return {}
    tasks = [int(number) for number, nodes in counts for _ in range(int(nodes or 1))]
    where = dict(enumerate(host for host, number in zip(hosts, tasks, strict=False) for _ in range(number)))
    return where if all(where.get(rank) == node for rank, node in known.items()) else {}


def judge_sums(board: Board, nodes: dict[str, list[int]], faults: Messages, warnings: Messages) -> Reports:
    """Return what all ranks measured, and record faults and slow nodes.

    A wrong sum is a fault of those of its ranks that saw no correct sum, or of all its ranks if there are none such.
    """
    measured = board.gather("sums", time.monotonic() + 10)
    last = board.gather("at", 0)
    if quiet := set(range(board.location.world_size)) - set(measured):
        for rank in quiet:  # they cause the errors of the others
            faults[rank].append(f"died or hangs at: {last[rank][1]}")
    elif failed := {rank: sums["error"] for rank, sums in measured.items() if "error" in sums}:
        for rank, text in failed.items():
            faults[rank].append(text)
    else:
        wrong = {rank: sums for rank, sums in measured.items() if sums["wrong"]}
        for rank, found in ({r: s for r, s in wrong.items() if not s["right"]} or wrong).items():
            faults[rank] += found["wrong"]
        for kind, what in (("within", "within the node"), ("neighbours", "with the better of its neighbours")):
            of_node = {node: bandwidth(measured, ranks, kind) for node, ranks in nodes.items()}
            speeds = {node: speed for node, speed in of_node.items() if speed is not None}
            for node, speed in speeds.items():
                if speed < (middle := statistics.median(speeds.values())) / 2:
                    text = f"slow: sums {what} at {speed / 1e9:.3g} GB/s, median of the nodes {middle / 1e9:.3g} GB/s"
                    for rank in nodes[node]:
                        warnings[rank].append(text)
    return measured


def bandwidth(measured: Reports, ranks: list[int], kind: str) -> float | None:
    """Return the bandwidth of the slowest of these ranks, in bytes per second."""
    return min((v for rank in ranks if (v := measured.get(rank, {}).get(kind)) is not None), default=None)


# --- what is printed


def lines(texts: Messages, where: dict[int, str]) -> Iterator[str]:
    """Yield one line for each message and node, with its ranks."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, found in sorted(texts.items()):
        for text in dict.fromkeys(found):
            ranks.setdefault((where[rank], text), []).append(rank)
    for (node, text), numbers in ranks.items():
        word = "rank" if len(numbers) == 1 else "ranks"
        yield f"node {node}, global {word} {spans(numbers)}: {text}"


def spans(numbers: list[int]) -> str:
    """Format [0, 1, 2, 5] as `0-2, 5`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def show(
    where: dict[int, str],
    reports: Reports,
    ahead: dict[int, float],
    measured: Reports,
    faults: Messages,
    warnings: Messages,
) -> None:
    """Print a table with a row for each node."""
    console = Console(width=None if sys.stdout.isatty() else 118)
    table = Table(
        "node", "global ranks", "device", "free, GB", "clock, s", "sums within, to neighbours, GB/s", "state"
    )
    states = {"at fault": faults, "warning": warnings}
    for node in dict.fromkeys(where.values()):
        ranks = [rank for rank in where if where[rank] == node]
        there = [rank for rank in ranks if rank in reports]
        devices = Counter(reports[rank]["device"] for rank in there if reports[rank]["device"])
        free = min((f for rank in there if (f := reports[rank]["free"]) is not None), default=None)
        clock = max((ahead[rank] for rank in ranks if rank in ahead), key=abs, default=None)
        speeds = [bandwidth(measured, ranks, kind) for kind in ("within", "neighbours")]
        table.add_row(
            node,
            spans(ranks),
            ", ".join(f"{number} x {name}" for name, number in devices.items()) or "-",
            "-" if free is None else f"{free / 1e9:,.1f}",
            f"{clock:+.3f}" if clock is not None else "-",
            ", ".join("-" if speed is None else f"{speed / 1e9:.3g}" for speed in speeds),
            next((state for state, texts in states.items() if any(texts.get(rank) for rank in ranks)), "well"),
        )
    console.print(table)


def summary(nodes: int, reports: Reports, measured: Reports) -> str:
    """Return the last line of a preflight that found no fault."""
    text = f"all {len(reports)} ranks on {nodes} nodes are well"
    for step in dict.fromkeys(step for report in reports.values() for step in report["shards"]):
        read = {number for report in reports.values() for number in report["shards"][step][0]}
        text += f"; {step}: {len(read)} of {reports[0]['shards'][step][1]} shards read"
    if speed := bandwidth(measured, list(reports), "all"):
        text += f"; sums over all ranks at {speed / 1e9:.3g} GB/s"
    return text
