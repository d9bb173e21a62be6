"""Plots of training curves and evaluations: as PNG files, and as SVG inside a page.

They need matplotlib, which the extra `plots` installs. Every function that draws returns a figure, which `save` or
`svg` writes.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from infini_train.files import atomic_file

# Colours of lines, of medium lightness, so that they can be told from light and from dark backgrounds.
COLOURS = ("#3a87d4", "#e0701b", "#2f9e62", "#d44a4a", "#9470d6", "#ad8233", "#d164a6", "#24a3a3")
STYLES = ("-", "--", "-.", ":")
# Stands for the colour of the page's text while an SVG is drawn, because matplotlib knows no `currentColor`.
INK = "#123456"


class Line(NamedTuple):
    """A line of `curves`.

    Attributes:
        label: its name in the legend.
        x: steps or tokens, in order.
        y: the values, NaN for a gap.
        low: lower ends of a band around the line, as long as `y`; None: there is no band.
        high: upper ends of the band.
        colour: index of its colour, of any size.
        style: index of its dash pattern, of any size.
        marks: places of dotted vertical lines in the same colour.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0
    style: int = 0
    marks: Sequence[float] = ()


def check_available() -> None:
    """Raise ValueError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("plots: matplotlib is not installed; pip install 'infini-train[plots]' brings it")


def curves(lines: Sequence[Line], *, xlabel: str, ylabel: str, log: bool = False) -> Any:
    """Draw lines over steps or tokens. Line i has the id `line-i` in an SVG.

    Args:
        lines: what to draw.
        xlabel: label of the x axis.
        ylabel: label of the y axis.
        log: draw a logarithmic y axis.
    """
    labels = [line.label for line in lines]
    columns = 2 if max(map(len, labels)) <= 32 else 1  # of the legend
    rows = math.ceil(len(lines) / columns) if len(lines) > 1 else 0
    figure = new_figure(6, 3.2 + 0.2 * rows)
    axes, drawn = figure.subplots(), []
    for i, line in enumerate(lines):
        colour, style = COLOURS[line.colour % len(COLOURS)], STYLES[line.style % len(STYLES)]
        for mark in line.marks:
            axes.axvline(mark, color=colour, linestyle=(0, (1, 3)), linewidth=1)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
        marker = "." if len(line.x) <= 30 else None
        drawn += axes.plot(line.x, line.y, style, color=colour, marker=marker, linewidth=1.3, gid=f"line-{i}")
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    axes.locator_params(axis="x", integer=True)
    if log:
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.15)
    if rows:  # the labels are given, because matplotlib leaves out those that begin with an underscore
        figure.legend(drawn, labels, loc="outside lower left", ncols=columns, fontsize="small")
    return figure


def accuracy_lines(tables: dict[str, list[dict[str, Any]]], modes: Sequence[str], chance: float) -> Any:
    """Draw accuracy with standard errors by segment, with a panel for each table and a line for each memory mode.

    Args:
        tables: rows of `Counts.rows` by the name of the task.
        modes: keys of the accuracies in a row.
        chance: accuracy of guessing, drawn as a dotted line.
    """
    figure = new_figure(5.5 * len(tables), 4)
    for axes, (name, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        axes.axhline(chance, color="grey", linestyle=":", label="chance")
        axes.set(title=name, xlabel="segment of the question", ylabel="accuracy", ylim=(-0.03, 1.03))
        _lines(axes, rows, {mode: mode for mode in modes})
    return figure


def losses_by_segment(rows: list[dict[str, Any]], names: dict[str, str]) -> Any:
    """Draw losses by segment.

    Args:
        rows: a dictionary for each segment: its name, `segment`, and the values and standard errors, KEY and KEY_se.
        names: labels of the lines by KEY.
    """
    figure = new_figure(6, 4)
    axes = figure.subplots()
    axes.set(xlabel="segment", ylabel="nats per token")
    _lines(axes, rows, names)
    return figure


def segments(rows: list[dict[str, Any]], heads: dict[str, list[list[float]]] | None) -> Any:
    """Draw the loss by segment for three states of the memory (on, off, of another document) and its benefit.

    Args:
        rows: rows of `SegmentLosses.rows`, with standard errors.
        heads: `share` and `read_norm`, each [layers, heads], for two heat maps below; None leaves them out.
    """
    figure = new_figure(11, 8 if heads else 4)
    (losses, differences), *below = figure.subplots(2 if heads else 1, 2, squeeze=False)
    losses.set(title="loss by segment and memory", xlabel="segment", ylabel="nats per token")
    _lines(losses, rows, {"on": "on", "off": "off", "other": "of another document"})
    differences.axhline(0, color="grey", linestyle=":")
    differences.set(title="benefit of the memory", xlabel="segment", ylabel="nats per token")
    _lines(differences, rows, {"off_minus_on": "off - on", "other_minus_on": "another document's - on"})
    titles = {"share": "memory's share of the mix", "read_norm": "norm of reads / of local attention's output"}
    for row in below:
        assert heads is not None
        for axes, (key, title) in zip(row, titles.items(), strict=True):
            _head_map(figure, axes, heads[key], title, 1 if key == "share" else None)
    return figure


def head_maps(maps: Mapping[str, Sequence[Sequence[float]]]) -> Any:
    """Draw heat maps side by side, of values from 0 to 1, each [layers, heads], by title."""
    layers, heads = (max(size) for size in zip(*((len(m), len(m[0])) for m in maps.values()), strict=True))
    panel = min(6.0, max(3.0, 1.6 + 0.3 * heads))  # inches
    figure = new_figure(panel * len(maps), min(9.0, max(2.4, 1.2 + 0.3 * layers)))
    for axes, (title, values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        _head_map(figure, axes, values, title, 1)
    return figure


def _head_map(figure: Any, axes: Any, values: Sequence[Sequence[float]], title: str, vmax: float | None) -> None:
    image = axes.imshow(values, vmin=0, vmax=vmax, aspect="auto")
    axes.set(title=title, xlabel="head", ylabel="layer")
    axes.locator_params(integer=True)
    figure.colorbar(image)


def _lines(axes: Any, rows: list[dict[str, Any]], names: dict[str, str]) -> None:
    """Plot the value of each key of `names` by segment with error bars; values that are None are left out."""
    rows = [row for row in rows if row["segment"] != "all"]
    for key, label in names.items():
        known = [row for row in rows if row[key] is not None]
        segments, errors = [row["segment"] for row in known], [row[f"{key}_se"] or 0 for row in known]
        axes.errorbar(segments, [row[key] for row in known], errors, label=label, marker=".", capsize=2)
    axes.tick_params(axis="x", rotation=45)
    axes.legend()


def heat_map(cells: list[dict[str, Any]], title: str) -> Any:
    """Draw the accuracy of each cell of `passkey_cells` as a heat map of depth by length."""
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("tokens", "depth"))
    accuracy = {(cell["depth"], cell["tokens"]): cell["right"] for cell in cells}
    figure = new_figure(2 + 0.8 * len(lengths), 1.5 + 0.4 * len(depths))
    axes = figure.subplots()
    image = axes.imshow([[accuracy[d, n] for n in lengths] for d in depths], vmin=0, vmax=1, aspect="auto")
    axes.set(title=title, xlabel="tokens", ylabel="depth (0: passkey at the beginning)")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    for i, d in enumerate(depths):
        for j, n in enumerate(lengths):
            colour = "black" if accuracy[d, n] > 0.5 else "white"  # what can be read on light and on dark cells
            axes.text(j, i, f"{accuracy[d, n]:.2f}", ha="center", va="center", color=colour)
    figure.colorbar(image)
    return figure


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, with its size in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, complete or not at all."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


@contextmanager
def page_style() -> Iterator[None]:
    """Draw figures for `svg` inside this context: transparent, axes and text in the page's colour of text."""
    import matplotlib
    from cycler import cycler

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    style: Any = {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.titlesize": "medium",
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "legend.frameon": False,
        "image.interpolation": "none",  # an image of one pixel for each value, which browsers enlarge without blur
        "path.simplify": False,
        "text.parse_math": False,  # a run may have any name
        "svg.fonttype": "none",  # text that can be selected, found and read aloud
        **dict.fromkeys(inked, INK),
    }
    with matplotlib.rc_context(style):
        yield


def svg(figure: Any, name: str, label: str) -> str:
    """Return a figure of `page_style` as an element for HTML.

    Args:
        figure: the figure.
        name: of letters and digits; begins every id in the element, so that a page can hold several.
        label: what the figure shows, for those who do not see it.
    """
    import matplotlib

    text = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same ids each time
        figure.savefig(text, format="svg", metadata=nothing)
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].strip()  # HTML has no XML declaration
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.DOTALL)  # it would hold for the whole page
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawn))  # all other ids may occur several times
    drawn = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used or m[1].startswith("line-") else "", drawn)
    drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", drawn).replace(INK, "currentColor")
    # A label comes from the user, who may have given a run any name.
    quoted = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{quoted}" ', 1)
