"""The report's curves: which figures there are, and each of them with its table."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from infini_train import plots

from .events import Point
from .parts import Drawing, Figure, Section, Table, cell
from .runs import Run

MOST_POINTS = 400  # of a line; longer curves are averaged over equal numbers of points
MOST_ROWS = 20  # of a curve's table


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
