"""Time that training waits for a save, and that saving and verifying take: python -m benchmarks.checkpoint --base DIR

Training waits for copies in memory only; a thread writes them, waits until they are on disk, and reads them back. Who
loads the checkpoint later compares the digests again. save_rounds.py says what is saved. The files are written to the
current directory, so this measures its disk.

DIR is another checkout, in which saves alternate with those of this one: `git worktree add /tmp/base 5b9ee2f` is the
last build that wrote neither digests nor read back. Without it only this checkout is measured.
A reader finds the files in the system's cache here.
"""

import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import results

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 7
WHAT = {
    "pause_s": "training waits",
    "write_s": "written and synced (and read back)",
    "verify_s": "verified by a reader",
}


def started(checkout: Path) -> subprocess.Popen[str]:
    """Start save_rounds.py with the code of a checkout."""
    command = [sys.executable, str(Path(__file__).with_name("save_rounds.py"))]
    variables = {**os.environ, "PYTHONPATH": str(checkout)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe, text=True)


def save(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Let the process save once, and return what it measured. Raises RuntimeError if it has ended instead."""
    assert process.stdin is not None and process.stdout is not None
    print("save", file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args}: ended with exit code {process.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--base", type=Path, help="the other checkout; without it only this one is measured")
    options = parser.parse_args()
    checkouts = {"this version": ROOT} | ({options.base.name: options.base.resolve()} if options.base else {})
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(started(path)) for name, path in checkouts.items()}
        for number in range(ROUNDS + 1):
            for name, process in processes.items():
                found = save(process)
                if number:  # the first one also gets the memory for the copies from the system
                    rounds[name].append(found)
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.close()
    table = Table("", "GB", *(f"{what}, {unit}" for what in WHAT.values() for unit in ("s", "GB/s")))
    figures: dict[str, Any] = {"benchmark": "checkpoint"}
    for name, measured in rounds.items():
        size = measured[0]["bytes"]
        medians = {key: statistics.median(one[key] for one in measured) for key in WHAT if key in measured[0]}
        cells = [f"{x:.2f}" for s in medians.values() for x in (s, size / s / 1e9)]
        table.add_row(name, f"{size / 1e9:.2f}", *cells, *["-"] * (2 * (len(WHAT) - len(medians))))
        figures[name] = {"bytes": size, **{key: round(s, 3) for key, s in medians.items()}}
    mine = figures["this version"]
    what = f"saving {mine['bytes'] / 1e9:.2f} GB: training waits; the thread writes and reads back; a reader verifies"
    said = f"{mine['pause_s']:.2f} s; {mine['write_s']:.1f} s; {mine['verify_s']:.1f} s"
    results.report("checkpoint", {"": table}, figures, {what: said}, options.results, width=140)


if __name__ == "__main__":
    main()
