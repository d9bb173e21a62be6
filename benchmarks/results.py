"""Results of benchmarks as files, docs/results/NAME.json, from which `make docs` renders tables in README and docs.

Every benchmark prints its tables and a last line of JSON. With `--results DIR` it also writes DIR/NAME.json: the
tables as printed, the figures behind them, a one-line summary, the command, the version of the code and the machine.
Trial runs leave the option out and change no file.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import cpuinfo
from infini_train.files import atomic_file
from infini_train.training.callbacks.throughput import measured_peak

# Options with a path, which the recorded command leaves out or names by what it holds.
PATHS = {"--results": None, "--root": None, "--data": "BOOKS", "--base": "BASE"}


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the option `--results`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, metavar="DIR", help="also write DIR/NAME.json, for `make docs`")
    return made


def report(
    name: str,
    tables: Mapping[str, Table],
    figures: Any,
    summary: Mapping[str, str],
    directory: Path | None,
    width: int | None = None,
) -> None:
    """Print tables and figures, and write them to a file if a directory is given.

    Args:
        name: of the result; NAME.json is the file.
        tables: by name; "" is the name of the only or main one.
        figures: all numbers, for programs; printed as the last line.
        summary: lines for the table of README: what was measured -> the figure.
        directory: where to write; None: only print.
        width: of the console, in characters.
    """
    console = Console(width=width)
    for table in tables.values():
        console.print(table)
    print(json.dumps(figures))
    if directory is not None:
        write(name, tables, figures, summary, directory)


def write(name: str, tables: Mapping[str, Table], figures: Any, summary: Mapping[str, str], directory: Path) -> None:
    """Write DIRECTORY/NAME.json; arguments as of `report`."""
    content = {
        "command": command(sys.argv),
        "version": version("infini-train"),
        "commit": commit(),
        "date": date.today().isoformat(),
        "machine": machine(),
        "summary": dict(summary),
        "tables": {key: as_rows(table) for key, table in tables.items()},
        "figures": figures,
    }
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_file(directory / f"{name}.json") as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def as_rows(table: Table) -> dict[str, list]:
    """The columns and rows of a table, as Markdown needs them: without line breaks."""
    columns = [" ".join(str(column.header).split()) for column in table.columns]
    cells = ([" ".join(str(cell).split()) for cell in column.cells] for column in table.columns)
    return {"columns": columns, "rows": [list(row) for row in zip(*cells, strict=True)]}


def command(argv: list[str]) -> str:
    """The command that a reader can type, without paths of this machine."""
    words = iter(argv[1:])
    kept = ["python", "-m", f"benchmarks.{Path(argv[0]).stem}"]
    for word in words:
        if word not in PATHS:
            kept.append(word)
            continue
        next(words, None)
        if name := PATHS[word]:
            kept += [word, name]
    return shlex.join(kept)


def commit() -> str | None:
    """The short hash of the checkout's commit; None outside of one."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def machine() -> dict[str, Any]:
    """Processor, cores, threads that torch uses, and the best float32 matrix product in GFLOP/s."""
    return {
        "cpu": cpuinfo("model name"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "GFLOP/s": round(max(map(measured_peak, (1024, 2048))) / 1e9),
        "torch": torch.__version__,
    }
