"""Prints the state of a run as a panel, of several runs as a table, or as JSON."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from json import dumps
from pathlib import Path
from typing import Any

from .report import Report, examine

UNKNOWN = "unknown"
COLOURS = {"running": "green", "finished": "bold green", "failed": "bold red", "gave up": "bold red"}


def inspect(runs: Sequence[Path], json: bool = False) -> None:
    """Print the state of runs: one run in full, several runs in one line each.

    Args:
        runs: directories of runs. Among several, a directory that is not a run's is reported on stderr and left out.
        json: print one JSON object per line and run instead. Times are in seconds since 1970.

    Raises:
        FileNotFoundError, NotADirectoryError: if the only directory given is not a run's.
    """
    now = time.time()
    reports = []
    for run in runs:
        try:
            reports.append(examine(run, now))
        except OSError as error:
            if len(runs) == 1:
                raise
            print(f"infini-train inspect: warning: {error}", file=sys.stderr)
    if json:
        for report in reports:
            print(dumps(finite(asdict(report))))
    elif len(runs) == 1:
        _panel(reports[0], now)
    elif reports:
        _table(reports)


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None, and leave out the checkpoint's metrics."""
    if isinstance(value, dict):
        return {name: finite(v) for name, v in value.items() if name != "metrics"}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rows(report: Report, now: float) -> list[tuple[str, str]]:
    """Return the names and texts of the panel's rows."""
    r, saved = report, report.checkpoint
    state = f"{r.state}: {r.detail}" if r.detail else r.state
    if r.last_sign_of_life is not None and r.state in ("running", "stopped"):
        state += f"{', ' if r.detail else ': '}last sign of life {ago(now - r.last_sign_of_life)} ago"
    step = f"{number(r.step)} of {number(r.max_steps)}"
    if r.step is not None and r.max_steps:
        step += f" ({r.step / r.max_steps:.1%})"
    found = [("run", r.run), ("state", state), ("step", step), ("tokens", number(r.tokens))]
    speed = UNKNOWN
    if r.tokens_per_second is not None and r.step_seconds is not None:
        speed = f"{r.tokens_per_second:,.0f} tokens/s, {r.step_seconds:.3g} s a step (recent median)"
    found += [("speed", speed), ("loss", real(r.loss))]
    if r.validation_step is not None:
        benefit = "" if r.memory_benefit is None else f", memory benefit {real(r.memory_benefit)}"
        found.append(("validation", f"{real(r.validation_loss)} at step {number(r.validation_step)}{benefit}"))
    causes = ", ".join(f"{count} x {cause}" for cause, count in r.restart_causes.items())
    found.append(("restarts", f"{r.restarts}: {causes}" if causes else str(r.restarts)))
    if saved is None:
        found.append(("checkpoint", "none"))
    elif saved.fault or saved.time is None or saved.bytes is None:
        found.append(("checkpoint", f"{saved.name}, damaged: {saved.fault}"))
    else:
        found.append(("checkpoint", f"{saved.name}, {ago(now - saved.time)} ago, {saved.bytes / 1e6:,.1f} MB"))
    if r.best is not None:
        found.append(("best", r.best))
    if r.ends is not None and r.remaining_seconds is not None:
        queueing = ", without time in the queue" if r.job else ""
        found.append(("ends", f"{local(r.ends)}, in {duration(r.ends - now)}{queueing}"))
    elif r.remaining_seconds:
        found.append(("to go", f"{duration(r.remaining_seconds)} of training"))
    optional = [("job", r.job), ("log", r.log), ("curves", r.tensorboard)]
    return found + [(name, text) for name, text in optional if text]


def _panel(report: Report, now: float) -> None:
    if not sys.stdout.isatty():  # one line per row, however long
        for name, text in rows(report, now):
            print(f"{name:<10}  {text}")
        return
    from rich.console import Console  # here, as for pipes and JSON it would take a third of the time
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, text in rows(report, now):
        style = COLOURS.get(report.state, "yellow") if name == "state" else ""
        grid.add_row(Text(name, style="dim"), Text(text, style=style))
    Console().print(Panel.fit(grid))


def _table(reports: list[Report]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)  # one line per run
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("state", no_wrap=True)
    for name in ("step", "done", "tokens/s", "loss", "val loss", "restarts", "ends"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in reports:
        done = f"{r.step / r.max_steps:.1%}" if r.step is not None and r.max_steps else UNKNOWN
        numbers = [number(r.step), done, number(r.tokens_per_second), real(r.loss), real(r.validation_loss)]
        ends = UNKNOWN if r.ends is None else f"{datetime.fromtimestamp(r.ends):%m-%d %H:%M}"
        cells = ["-" if text == UNKNOWN else text for text in [*numbers, str(r.restarts), ends]]
        table.add_row(Text(r.run), Text(r.state, style=COLOURS.get(r.state, "yellow")), *map(Text, cells))
    console.print(table)


def number(value: float | None) -> str:
    """Format a count, or UNKNOWN."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def real(value: float | None) -> str:
    """Format a loss, or UNKNOWN."""
    return UNKNOWN if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Format a duration as `1 day, 2:03:04`."""
    return str(timedelta(seconds=round(seconds)))


def ago(seconds: float) -> str:
    """Format a duration in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def local(when: float) -> str:
    """Format a time in the local time zone."""
    return f"{datetime.fromtimestamp(when).astimezone():%Y-%m-%d %H:%M %Z}"
