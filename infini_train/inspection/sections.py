"""What the report of runs shows, section by section: figures, tables and texts."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from infini_train import plots
from infini_train.run_files import CONFIG, HEAT_MAP_CELL

from . import evaluations as of
from .evaluations import Evaluation
from .events import History, Point
from .report import Report
from .show import UNKNOWN, number, real

MOST_POINTS = 400  # of a line; longer curves are averaged over equal numbers of points
MOST_ROWS = 20  # of a curve's table
WIDE = 7.0  # inches; as wide as a column of the page
NO_VALUE = "-"


class Curve(NamedTuple):
    """A figure of curves.

    Attributes:
        title: its title.
        unit: label of the y axis.
        tags: the tags that it shows, as patterns of `fnmatch`. Tags of a validation dataset with a name hold it.
        log: whether the y axis is logarithmic where values span more than a decade.
        by_tokens: whether it is drawn over the tokens read, instead of over steps.
    """

    title: str
    unit: str
    tags: tuple[str, ...]
    log: bool = False
    by_tokens: bool = False

    def shows(self, tag: str) -> bool:
        """Return whether this figure is the one of a tag."""
        return any(fnmatchcase(tag, pattern) for pattern in self.tags)


CURVES = (
    Curve("Training loss", "nats per token", ("train/loss",)),
    Curve("Validation loss", "nats per token", ("val/loss", "val/*/loss")),
    Curve(
        "Validation: loss with the memory off, minus on",
        "nats per token",
        ("val/memory_benefit", "val/*/memory_benefit"),
    ),
    Curve("Validation: recall of what only the memory knows", "share of answers", ("val/recall*", "val/*/recall*")),
    Curve("Learning rates", "learning rate", ("train/lr_*",)),
    Curve("Gradient norm", "norm", ("train/gradient_norm",), log=True),
    Curve("Throughput", "tokens per second", ("speed/tokens_per_second",)),
    Curve("Waiting for data", "share of the time", ("speed/data_wait_share",)),
    Curve("Datasets of the mixture", "share of the tokens", ("data/share *",)),
)
BY_TOKENS = (  # for runs that read different numbers of tokens a step
    Curve("Training loss by tokens", "nats per token", ("train/loss",), by_tokens=True),
    Curve("Validation loss by tokens", "nats per token", ("val/loss",), by_tokens=True),
)
ELSEWHERE = Curve("", "", ("val/*segment_*", "train/tokens", "epoch", "hp_metric"))  # tags that need no figure
# The dataset's name if it has one, the segments, and whether the memory is off.
BY_SEGMENT = re.compile(r"val/(?:(.+)/)?segment_(\d+(?:-\d+)?)(_memory_off)?")
HEAT_MAPS = {  # by the two ends of a tag
    ("gates/", "layer_by_head"): "gate: sigmoid(beta)",
    ("heads/", "memory_share"): "memory's share of the mix",
    ("heads/", "read_norm_of_both"): "norm of reads, of reads + local",
}


@dataclass
class Run:
    """A run, and all that the report needs of it.

    Attributes:
        path: its directory.
        name: what the report calls it: the directory's name, or the whole path where two have the same name.
        state: what `infini-train inspect` tells.
        logged: its curves, images and texts.
        config: its configuration; None: it cannot be read.
    """

    path: Path
    name: str
    state: Report
    logged: History
    config: Any

    def points(self, tag: str) -> list[Point]:
        """Return the points of a curve, or none."""
        return self.logged.points.get(tag, [])

    def tokens_per_step(self) -> int:
        """Return how many tokens an optimizer step reads, or 0 if that was not logged."""
        step, _, tokens = next(iter(self.points("train/tokens")), Point(1, 0.0, 0.0))
        return round(tokens / step)


class Table(NamedTuple):
    """A table; the first cell of a row is its header. `shades` are numbers from 0 to 1 that colour the cells."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    shades: list[list[float]] | None = None


class Figure(NamedTuple):
    """A picture with its caption and, to unfold, the tables of what it shows. A wide one takes a row of the page."""

    caption: str
    svg: Markup
    tables: list[Table]
    wide: bool


class Text(NamedTuple):
    """A text as it is, to unfold."""

    caption: str
    text: str


class Section(NamedTuple):
    """A section of the page. `more` is to unfold."""

    name: str
    title: str
    note: str
    parts: Sequence[Table | Figure | Text]
    more: Sequence[Figure] = ()


class Drawing:
    """Makes figures, and numbers them, so that their ids differ."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, drawn: Any, caption: str, *tables: Table) -> Figure:
        self.count += 1
        svg = Markup(plots.svg(drawn, f"f{self.count}", caption))
        return Figure(caption, svg, list(tables), wide=drawn.get_figwidth() > WIDE)


def sections(runs: Sequence[Run], evaluations: Sequence[Evaluation], draw: Drawing) -> Iterator[Section]:
    """Yield the sections of the page; one without parts has nothing to show."""
    yield overview(runs)
    yield curves(runs, draw)
    yield by_segment(runs, [e for e in evaluations if e.kind == of.SEGMENTS], draw)
    yield heads(runs, draw)
    yield recall([e for e in evaluations if e.kind == of.RECALL], draw)
    yield passkeys([e for e in evaluations if e.kind == of.PASSKEY], draw)
    yield samples(runs)
    yield configuration(runs)


def overview(runs: Sequence[Run]) -> Section:
    """Return a table with a row for each run, and the numbers of its last step."""
    header = ["run", "state", "step", "tokens", "training loss", "validation loss", "lowest validation loss"]
    header += ["memory off - on", "tokens/s", "waiting for data", "restarts"]
    rows = []
    for run in runs:
        s = run.state
        lowest = min(
            (p for p in run.points("val/loss") if math.isfinite(p.value)), key=lambda p: p.value, default=None
        )
        wait = run.points("speed/data_wait_share")
        causes = ", ".join(f"{count} x {cause}" for cause, count in s.restart_causes.items())
        rows.append(
            [
                run.name,
                f"{s.state}: {s.detail}" if s.detail else s.state,
                f"{number(s.step)} of {number(s.max_steps)}",
                number(s.tokens),
                real(s.loss),
                real(s.validation_loss),
                f"{real(lowest.value)} at step {lowest.step:,}" if lowest else UNKNOWN,
                real(s.memory_benefit),
                number(s.tokens_per_second),
                f"{wait[-1].value:.1%}" if wait else UNKNOWN,
                f"{s.restarts}: {causes}" if causes else str(s.restarts),
            ]
        )
    cells = [[NO_VALUE if cell == UNKNOWN else cell for cell in row] for row in rows]
    note = "The numbers are those of the last step; losses are in nats per token."
    return Section("overview", "Overview", note, [Table("Runs", header, cells)])


def curves(runs: Sequence[Run], draw: Drawing) -> Section:
    """Return figures of all curves of the runs."""
    tags = sorted(set().union(*(run.logged.points for run in runs)))
    sizes = {run.tokens_per_step() for run in runs}
    wanted = (*CURVES, *BY_TOKENS) if len(sizes) > 1 and all(sizes) else CURVES
    main = [curve_figure(curve, runs, [tag for tag in tags if curve.shows(tag)], draw) for curve in wanted]
    others = [tag for tag in tags if not any(curve.shows(tag) for curve in (*CURVES, ELSEWHERE))]
    more = [curve_figure(Curve(tag, "", (tag,)), runs, [tag], draw) for tag in others]
    note = (
        "Steps that a restarted run did again are shown once, and dotted lines mark where it went on. A curve of "
        f"more than {MOST_POINTS} points is drawn as means of equally many points, in a band from the lowest to the "
        "highest of them."
    )
    return Section("curves", "Curves", note, [f for f in main if f], [f for f in more if f])


def curve_figure(curve: Curve, runs: Sequence[Run], tags: Sequence[str], draw: Drawing) -> Figure | None:
    """Return the figure of some tags in all runs that have them, or None if none has."""
    lines, labels, columns = [], [], []
    shown = [(i, run, j, tag) for i, run in enumerate(runs) for j, tag in enumerate(tags) if run.points(tag)]
    if not shown:
        return None
    for i, run, j, tag in shown:
        short = tag.partition("/")[2] or tag
        label = short if len(runs) == 1 else run.name if len(tags) == 1 else f"{run.name}: {short}"
        unit = run.tokens_per_step() if curve.by_tokens else 1
        points = [point._replace(step=unit * point.step) for point in run.points(tag)]
        marks = [unit * step for step in run.logged.resumed if unit * step <= points[-1].step] if j == 0 else []
        colour = j if len(runs) == 1 else i
        lines.append(plots.Line(label, *thinned(points), colour=colour, style=j, marks=marks))
        labels.append(label)
        columns.append({point.step: point.value for point in points})
    finite = [value for values in columns for value in values.values() if math.isfinite(value)]
    log = curve.log and bool(finite) and 0 < 10 * min(finite) < max(finite)
    across = "tokens" if curve.by_tokens else "step"
    drawn = plots.curves(lines, xlabel=across, ylabel=curve.unit, log=log)
    steps = evenly(sorted(set().union(*columns)))
    rows = [[f"{step:,}", *(cell(values.get(step)) for values in columns)] for step in steps]
    return draw(drawn, curve.title, Table(curve.title, [across, *labels], rows))


def thinned(points: Sequence[Point]) -> tuple[list[float], list[float], list[float] | None, list[float] | None]:
    """Return steps, values, and the ends of a band: at most MOST_POINTS means, or all points without a band.

    What is not finite counts in no mean, and is a gap where a mean has nothing else.
    """
    steps, values = (np.array(column, float) for column in ([p.step for p in points], [p.value for p in points]))
    values[~np.isfinite(values)] = np.nan
    if len(points) <= MOST_POINTS:
        return steps.tolist(), values.tolist(), None, None
    bins = np.array_split(np.arange(len(points)), MOST_POINTS)
    there = [np.isfinite(values[those]).any() for those in bins]
    mean, low, high = (
        [float(of_bin(values[those])) if some else math.nan for those, some in zip(bins, there, strict=True)]
        for of_bin in (np.nanmean, np.nanmin, np.nanmax)
    )
    return [float(steps[those].mean()) for those in bins], mean, low, high


def evenly(values: Sequence[int]) -> list[int]:
    """Return at most MOST_ROWS of these values, evenly from the first to the last."""
    if len(values) <= MOST_ROWS:
        return list(values)
    return [values[round(i)] for i in np.linspace(0, len(values) - 1, MOST_ROWS)]


def cell(value: float | None) -> str:
    """Format a value of a curve."""
    return NO_VALUE if value is None else f"{value:,.6g}"


def by_segment(runs: Sequence[Run], evaluations: Sequence[Evaluation], draw: Drawing) -> Section:
    """Return losses by segment: those of each run's last validation, and those of evaluations."""
    parts = [figure for figure in [validation_by_segment(runs, draw)] if figure]
    for path, _, found in evaluations:
        rows = [row for row in found["segments"] if row["tokens"]]
        columns = {"on": "on", "off": "off", "off - on": "off_minus_on", "other": "other"}
        columns["other - on"] = "other_minus_on"
        cells = [
            [row["segment"], f"{row['tokens']:,.0f}", *(with_error(row, key) for key in columns.values())]
            for row in rows
        ]
        tables = [Table("Loss by segment, nats per token", ["segment", "tokens", *columns], cells)]
        use = found.get("heads")
        titles = {"share": "memory's share of the mix", "read_norm": "norm of reads over that of local attention"}
        tables += [head_table(title, use[key]) for key, title in titles.items()] if use else []
        parts.append(draw(plots.segments(rows, use), about("Loss by segment", path, found), *tables))
    note = (
        "Loss by the number of the segment in its document. Off: no layer reads its memory. Other: the document "
        "continues with the memory that another document left. Errors are standard errors over documents."
    )
    return Section("segments", "Loss by segment", note, parts)


def validation_by_segment(runs: Sequence[Run], draw: Drawing) -> Figure | None:
    """Return the losses by segment of each run's last validation, or None if no run has validated."""
    values: dict[str, dict[str, float]] = {}  # by label and segment
    for run in runs:
        found = {tag: match for tag in run.logged.points if (match := BY_SEGMENT.fullmatch(tag))}
        last = max((run.points(tag)[-1].step for tag in found), default=None)
        for tag, match in found.items():
            point, (dataset, segment, off) = run.points(tag)[-1], match.groups()
            if point.step == last:
                words = [run.name if len(runs) > 1 else "", dataset or "", "memory off" if off else "memory on"]
                values.setdefault(": ".join(filter(None, words)), {})[segment] = point.value
    if not values:
        return None
    names = sorted(set().union(*values.values()), key=lambda name: int(name.partition("-")[0]))
    rows: list[dict[str, Any]] = []
    for name in names:
        known = {label: there.get(name) for label, there in values.items()}
        rows.append({"segment": name, **known, **{f"{label}_se": None for label in known}})
    title = "Last validation of each run" if len(runs) > 1 else "Last validation"
    cells = [[row["segment"], *(cell(row[label]) for label in values)] for row in rows]
    drawn = plots.losses_by_segment(rows, {label: label for label in values})
    return draw(drawn, title, Table(f"{title}: loss by segment, nats per token", ["segment", *values], cells))


def heads(runs: Sequence[Run], draw: Drawing) -> Section:
    """Return the last heat maps of layers and heads of each run."""
    parts = []
    for run in runs:
        maps, tables = {}, []
        for (begin, end), title in HEAT_MAPS.items():
            for tag, (step, image) in sorted(run.logged.images.items()):
                if tag.startswith(begin) and tag.endswith(end):
                    dataset = tag.removeprefix(begin).removesuffix(end).strip("/")
                    name = f"{dataset}: {title}" if dataset else title
                    maps[name] = values_of(image)
                    tables.append(head_table(f"{name}, step {step:,}", maps[name]))
        if maps:
            parts.append(draw(plots.head_maps(maps), run.name, *tables))
    note = (
        "Gates and shares of the memory by layer and head, as last logged, from 0 (nothing from the memory) to 1. "
        "Shares and norms are means over the tokens of a validation."
    )
    return Section("heads", "Gates and reads", note, parts)


def values_of(image: bytes) -> list[list[float]]:
    """Return the values, from 0 to 1 in steps of 1/255, of a heat map that a run logged as PNG."""
    from matplotlib.image import imread

    pixels = imread(BytesIO(image), format="png")[..., 0]
    return pixels[HEAT_MAP_CELL // 2 :: HEAT_MAP_CELL, HEAT_MAP_CELL // 2 :: HEAT_MAP_CELL].tolist()


def head_table(title: str, values: Sequence[Sequence[float]]) -> Table:
    """Return a table of values, a row for each layer."""
    rows = [[str(layer), *(f"{value:.2f}" for value in row)] for layer, row in enumerate(values)]
    return Table(title, ["layer", *(f"head {head}" for head in range(len(values[0])))], rows)


def recall(evaluations: Sequence[Evaluation], draw: Drawing) -> Section:
    """Return the accuracies of evaluations of recall."""
    parts = []
    for path, _, found in evaluations:
        named = {name.replace("_", " "): rows for name, rows in found["accuracy"].items()}
        tables = []
        for name, rows in named.items():
            cells = [
                [r["segment"], f"{r['answers']:,.0f}", *(with_error(r, mode) for mode in of.MODES)] for r in rows
            ]
            shades = [[0, *(row[mode] for mode in of.MODES)] for row in rows]
            tables.append(Table(f"Accuracy: {name}", ["segment", "answers", *of.MODES], cells, shades))
        drawn = plots.accuracy_lines(named, of.MODES, found["chance"])
        parts.append(draw(drawn, about("Recall", path, found), *tables))
    note = (
        "Right answers by the segment of the question, with the document's own memory (on), none (off) and another "
        "document's (other). Memory only: the key was last told in an earlier segment. Latest: of these, the key has "
        "had several values."
    )
    return Section("recall", "Recall", note, parts)


def passkeys(evaluations: Sequence[Evaluation], draw: Drawing) -> Section:
    """Return the heat maps of evaluations of passkeys."""
    parts = []
    for path, _, found in evaluations:
        cells = {(cell["depth"], cell["tokens"]): cell["right"] for cell in found["cells"]}
        depths, lengths = (sorted(set(values)) for values in zip(*cells, strict=True))
        shades = [[cells[depth, length] for length in lengths] for depth in depths]
        rows = [[f"{depth:g}", *(f"{value:.2f}" for value in row)] for depth, row in zip(depths, shades, strict=True)]
        header = ["depth", *(f"{length:,} tokens" for length in lengths)]
        table = Table("Passkeys recalled", header, rows, shades)
        parts.append(draw(plots.heat_map(found["cells"], ""), about("Passkeys", path, found), table))
    note = "Share of passkeys with every digit right, by length of the document and depth of the key in it."
    return Section("passkeys", "Passkeys", note, parts)


def samples(runs: Sequence[Run]) -> Section:
    """Return the last text of each tag that runs have logged."""
    parts = []
    for run in runs:
        for tag, texts in run.logged.texts.items():
            step, text = texts[-1]
            parts.append(Text(f"{run.name}: {tag.removesuffix('/text_summary')}, step {step:,}", text))
    return Section("samples", "Samples of text", "The last text of each kind that a run has logged.", parts)


def configuration(runs: Sequence[Run]) -> Section:
    """Return the options in which runs differ, and all options of each run."""
    parts: list[Table | Text] = []
    options = [flat(run.config) for run in runs]
    if len(runs) > 1:
        names = sorted(set().union(*options) - {"run"})
        rows = [[name, *(found.get(name, NO_VALUE) for found in options)] for name in names]
        different = [row for row in rows if len(set(row[1:])) > 1] or [["none", *([NO_VALUE] * len(runs))]]
        parts.append(Table("Options that differ", ["option", *(run.name for run in runs)], different))
    for run in runs:
        file = run.path / CONFIG
        text = file.read_text(errors="replace") if run.config is not None else "This file cannot be read."
        parts.append(Text(str(file), text))
    return Section("configuration", "Configuration", "The options of the last start of each run.", parts)


def flat(tree: Any, name: str = "") -> dict[str, str]:
    """Return the values of nested dictionaries as texts, by their names joined with dots."""
    if isinstance(tree, dict) and tree:
        return {
            k: v for key, value in tree.items() for k, v in flat(value, f"{name}.{key}" if name else str(key)).items()
        }
    return {name: "null" if tree is None else str(tree)} if name else {}


def with_error(row: dict[str, Any], key: str) -> str:
    """Format a value and, if there is one, its standard error."""
    if row[key] is None:
        return NO_VALUE
    return f"{row[key]:.4f}" + ("" if row[f"{key}_se"] is None else f" ± {row[f'{key}_se']:.4f}")


def about(what: str, path: Path, found: dict[str, Any]) -> str:
    """Return the caption of an evaluation."""
    return f"{what}: {found.get('model', 'a model')} on {found['dataset']} ({path})"
