"""Writes the report of runs: one HTML page that needs no other file, no network and no script."""

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from infini_train import plots
from infini_train.files import atomic_file

from .evaluations import evaluations_of, given_evaluation
from .parts import Drawing
from .runs import read_runs
from .sections import sections

GENERATOR = '<meta name="generator" content="infini-train report">'  # by which a page is known that may be replaced


def write_report(runs: Sequence[Path], out: Path, results: Sequence[Path] = ()) -> None:
    """Write the report of runs as an HTML page, and print what it holds.

    Args:
        runs: directories of runs.
        out: HTML file to write; a report that is there is replaced.
        results: JSON files of evaluations, in addition to those that lie in the directories of the runs.

    Raises:
        FileExistsError: `out` is something else than a report.
        FileNotFoundError, NotADirectoryError, ValueError: a run is none or has logged nothing, an evaluation is none,
            `out` cannot be written, or matplotlib is not installed.
    """
    plots.check_available()
    check_output(out)
    found = read_runs(runs)
    evaluations = {e.path.resolve(): e for run in found for e in evaluations_of(run.path)}
    evaluations |= {path.resolve(): given_evaluation(path) for path in results}
    draw = Drawing()
    with plots.page_style():
        parts = [section for section in sections(found, list(evaluations.values()), draw) if section.parts]
    environment = Environment(loader=PackageLoader("infini_train", "inspection"), autoescape=True, trim_blocks=True)
    page = environment.get_template("page.html").render(
        generator=Markup(GENERATOR),
        title=found[0].name if len(found) == 1 else f"{len(found)} runs",
        sections=parts,
        version=version("infini-train"),
        date=f"{time.strftime('%Y-%m-%d %H:%M %Z')}",
        kind=lambda part: type(part).__name__,
    )
    with atomic_file(out) as file:
        file.write(page.encode())
    count = f"{len(found)} run{'s' if len(found) > 1 else ''}, {draw.count} figures"
    print(f"{out}: {count}, {len(evaluations)} evaluations, {out.stat().st_size / 1e6:.1f} MB")


def check_output(out: Path) -> None:
    """Raise FileExistsError or FileNotFoundError if the page cannot be written there."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such directory to write {out.name} to")
    if out.is_dir():
        raise FileExistsError(f"{out}: found a directory, expected the HTML file to write")
    if out.exists() and GENERATOR.encode() not in out.read_bytes()[:1000]:
        raise FileExistsError(f"{out}: exists and is no report; name a file that does not")
