"""Check every rank before training, and name the node that is at fault.

    srun --kill-on-bad-exit=1 infini-train preflight --config RESOLVED.yaml     (or torchrun, or one process)

Every rank checks its device, index and shards (a random sample, by checksum), run directory, versions and code. Ranks
report through a key-value store on rank 0's node instead of collectives, so that a rank that never comes can be
named. If all reports are good, sums over the ranks of a node, of two neighbouring nodes and of all nodes are checked
and timed.

Exit code 0: no fault was found (slow nodes only cause a warning); 1: a rank is at fault; 2: rank 0 cannot read the
configuration.
"""

import argparse
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

# Set before torch is imported: its errors are raised anyway, and need no log with C++ frames.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
# A sum that takes too long then raises an exception instead of aborting the process.
os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")

import torch
import torch.distributed as dist

from infini_train import preemption
from infini_train.data.mixture import parts_of
from infini_train.data.remote import load_index
from infini_train.errors import OptionParser
from infini_train.files import sha256_of_file
from launch import preflight_checks as checks
from launch import preflight_verdict as verdict
from launch.preflight_board import Board, RankLocation

PACKAGES = ("torch", "deepspeed", "lightning", "transformers", "numpy")


def examine(board: Board, options: argparse.Namespace) -> dict[str, Any]:
    """Run all checks of this rank and return its report. What a check raises becomes a fault in the report."""
    location, same, faults, warnings = board.location, {"python": platform.python_version()}, list[str](), list[str]()
    report: dict[str, Any] = {"node": location.node, "same": same, "faults": faults, "warnings": warnings}
    report |= {"device": None, "backend": None, "free": None, "shards": {}}
    report |= {"threads": torch.get_num_threads(), "cores": sorted(os.sched_getaffinity(0))}

    def check(step: str, function: Callable[..., Any], *arguments: Any) -> Any:
        board.at(step)
        try:
            return function(*arguments)
        except Exception as error:
            kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
            faults.append(f"{step}: {kind}{' '.join(str(error).split())}")

    same |= {package: check("versions", version, package) for package in PACKAGES}
    same["sha256 of infini_train's code"] = check("code", checks.code)
    config = check("config", checks.read_config, options.config)
    report["config"] = config is not None
    run = options.run or Path(config["run"] if config else "")
    if location.rank == 0:  # before the slow checks, because the other ranks wait for it
        board.token, content = run / f"{checks.TOKEN}{uuid.uuid4().hex}", uuid.uuid4().hex
        made = config and check("run directory", checks.leave_token, board.token, content)
        board.post("token", [str(board.token), content] if made else None)
    if config is None:
        return report
    same["sha256 of the config"] = sha256_of_file(options.config)
    if found := check("device", checks.device, config["trainer"]["accelerator"], location, warnings):
        report["device"], report["backend"] = found
        same["backend"] = report["backend"]
    train = config["data"]["train"]
    datasets = {"data.train": train}
    if isinstance(train, list):
        datasets = {f"data.train[{i}]": part.path for i, part in enumerate(parts_of(train))}
    cache, gb = config["data"].get("cache"), config["data"].get("cache_gb", 50)  # for datasets at URLs
    load = partial(load_index, cache=Path(cache) if cache else None, cache_bytes=int(gb * 2**30))
    validation = config["data"]["validation"]
    if isinstance(validation, dict):
        datasets |= {f"data.validation.{name}": where for name, where in validation.items()}
    else:
        datasets["data.validation"] = validation
    for step, where in datasets.items():
        if where is None or (index := check(step, load, where)) is None:
            continue
        same[f"fingerprint of {step}"] = index.fingerprint
        if location.local_rank == 0:  # reads the size of every shard, so one rank per node is enough
            check(step, index.check_files)
        report["shards"][step] = [check(step, checks.sample, index, location) or [], len(index.shards)]
    token = board.read("token", options.timeout)
    if token and check("run directory", checks.see_token, Path(token[0]), token[1]):
        report["free"] = check("run directory", checks.write, run)
    if location.rank == 0 and report["free"] is not None:
        check("room", checks.room, run, config, report["free"], warnings)
    board.at("finished")
    return report


def sums(board: Board, nodes: dict[str, list[int]], backend: str, timeout: float) -> None:
    """Take part in the sums over ranks, and post their measurements or the `error` that ended them."""
    try:
        store = dist.PrefixStore("sums", board.store)
        found = checks.measure(board.location, list(nodes.values()), backend, store, timeout, board.at)
    except Exception as error:
        found = {"error": f"{board.step}: {' '.join(str(error).split())[:300]}"}
    board.post(f"sums/{board.location.rank}", found)


def lead(board: Board, options: argparse.Namespace) -> int:
    """Rank 0: evaluate all reports and, if they are good, the sums; print the result and tell the ranks."""
    begin = time.monotonic()
    with within(options.timeout, board):
        board.post("report/0", examine(board, options))
    reports = board.gather("report", max(begin + options.timeout, time.monotonic() + 1))
    faults, warnings, measured = (
        defaultdict[int, list[str]](list),
        defaultdict[int, list[str]](list),
        verdict.Reports(),
    )
    for rank, report in reports.items():
        faults[rank] += report["faults"]
        warnings[rank] += report["warnings"]
    where = verdict.silent(board, reports, options.timeout, faults)
    nodes = {node: [rank for rank in where if where[rank] == node] for node in dict.fromkeys(where.values())}
    verdict.differing(reports, faults)
    verdict.threads(nodes, reports, warnings)
    ahead = verdict.clocks(board, reports, faults)
    if any(faults.values()) or len(where) == 1:
        board.post("sums", None)
    else:
        board.post("sums", nodes)
        with within(2 * options.timeout, board):
            sums(board, nodes, reports[0]["backend"], options.timeout)
        measured = verdict.judge_sums(board, nodes, faults, warnings)
    code = 2 if not reports[0]["config"] else int(any(faults.values()))

    verdict.show(where, reports, ahead, measured, faults, warnings)
    sys.stdout.flush()
    for line in verdict.lines(warnings, where):
        print(f"preflight: warning: {line}", file=sys.stderr)
    for line in verdict.lines(faults, where):
        print(f"preflight: {line}", file=sys.stderr)
    if not code:
        print(f"preflight: {verdict.summary(len(nodes), reports, measured)}")
    sys.stdout.flush()
    ignore_signals()
    board.post("end", code)
    end = time.monotonic() + 5
    while board.store.add("know", 0) < len(reports) - 1 and time.monotonic() < end:
        time.sleep(0.02)
    board.post("all know", None)
    return code


def follow(board: Board, options: argparse.Namespace) -> int:
    """Any other rank: report, answer rank 0, and return its exit code."""
    rank, patience = board.location.rank, options.timeout + 60
    with within(options.timeout, board):
        report = examine(board, options)
    board.post(f"report/{rank}", report)
    board.read(f"turn/{rank}", patience)
    board.post(f"clock/{rank}", time.time())
    if nodes := board.read("sums", patience):
        with within(2 * options.timeout, board):
            sums(board, nodes, report["backend"], options.timeout)
    code: int = board.read("end", 2 * patience)
    ignore_signals()
    board.store.add("know", 1)
    with suppress(dist.DistError):  # rank 0, and with it the store, may be gone by now
        board.read("all know", 5)
    return code


@contextmanager
def within(seconds: float, board: Board) -> Iterator[None]:
    """End this process if the block takes longer: by SystemExit, or at once where no Python code runs."""

    def give_up(*_: object) -> NoReturn:
        what = f"preflight: {board.location}: not done after {seconds:.0f} s with: {board.step}"
        print(what, file=sys.stderr, flush=True)
        sys.exit(1)

    def end() -> None:
        try:
            give_up()
        finally:
            os._exit(1)

    last = threading.Timer(seconds + 5, end)
    last.daemon = True
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    last.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        last.cancel()


def interrupted(number: int, frame: object) -> NoReturn:
    """Exit. SIGUSR1 also leaves the marker of preemption; SIGTERM does not, since srun sends it when a rank fails."""
    if number == signal.SIGUSR1 and (marker := os.environ.get(preemption.MARKER)):
        Path(marker).touch()
    sys.exit(128 + number)


def ignore_signals() -> None:
    """Keep the verdict's exit code although srun signals all ranks when the first one leaves."""
    for number in preemption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """`infini-train preflight`. Ends the process: a group whose sums failed may hang in its destructor."""
    style = argparse.RawDescriptionHelpFormatter
    parser = OptionParser(prog="infini-train preflight", description=__doc__, formatter_class=style)
    parser.add_argument(
        "--config", type=Path, required=True, help="resolved configuration, as `fit --print_config` writes it"
    )
    parser.add_argument("--run", type=Path, help="directory of the run; by default the configuration's")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds within which all ranks must report")
    options = parser.parse_args(arguments)
    for number in preemption.SIGNALS:
        signal.signal(number, interrupted)
    code = preflight(options)
    sys.stdout.flush()
    os._exit(code)


def preflight(options: argparse.Namespace) -> int:
    """Run this rank's part of the preflight, and return the exit code."""
    location, board = RankLocation.here(), None
    try:
        board = Board(location, options.timeout)
        return (lead if location.rank == 0 else follow)(board, options)
    except ConnectionError as error:
        print(f"preflight: {location}: {error}", file=sys.stderr)
        return 1
    except dist.DistError as error:
        print(f"preflight: {location}: rank 0 has gone or hangs: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        if board and board.token:
            board.token.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
