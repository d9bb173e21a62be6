"""Plots of evaluations, as PNG files. matplotlib comes with the extra `eval`; nothing else needs it."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infini_train.files import atomic_file


def check_available() -> None:
    """Raises ValueError if there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ValueError("plot: matplotlib is not installed; pip install 'infini-train[eval]' brings it")


def accuracy_lines(path: Path, tables: dict[str, list[dict[str, Any]]], modes: Sequence[str], chance: float) -> None:
    """A panel for each table of `Counts.rows`, with a line for each mode: accuracy and standard error by segment."""
    figure = new_figure(5.5 * len(tables), 4)
    for axes, (name, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        axes.axhline(chance, color="grey", linestyle=":", label="chance")
        axes.set(title=name, xlabel="segment of the question", ylabel="accuracy", ylim=(-0.03, 1.03))
        _lines(axes, rows, {mode: mode for mode in modes})
    save(figure, path)


def segments(path: Path, rows: list[dict[str, Any]], heads: dict[str, list[list[float]]] | None) -> None:
    """`SegmentLosses.rows`, losses under the three memories and their differences, with standard errors; below, the
    share of the memory and the norm of its reads, each [layers, heads], if there are any."""
    figure = new_figure(11, 8 if heads else 4)
    (losses, differences), *below = figure.subplots(2 if heads else 1, 2, squeeze=False)
    losses.set(title="loss by segment and memory", xlabel="segment", ylabel="nats per token")
    _lines(losses, rows, {"on": "on", "off": "off", "other": "of another document"})
    differences.axhline(0, color="grey", linestyle=":")
    differences.set(title="what the memory is worth", xlabel="segment", ylabel="nats per token")
    _lines(differences, rows, {"off_minus_on": "off - on", "other_minus_on": "another document's - on"})
    titles = {"share": "memory's share of the mix", "read_norm": "norm of reads / of local attention's output"}
    for row in below:
        assert heads is not None
        for axes, (key, title) in zip(row, titles.items(), strict=True):
            image = axes.imshow(heads[key], vmin=0, vmax=1 if key == "share" else None, aspect="auto")
            axes.set(title=title, xlabel="head", ylabel="layer")
            axes.locator_params(integer=True)
            figure.colorbar(image)
    save(figure, path)


def _lines(axes: Any, rows: list[dict[str, Any]], names: dict[str, str]) -> None:
    """A line with error bars over the segments for each of these values, where there is one."""
    rows = [row for row in rows if row["segment"] != "all"]
    for key, label in names.items():
        there = [row for row in rows if row[key] is not None]
        places, errors = [row["segment"] for row in there], [row[f"{key}_se"] or 0 for row in there]
        axes.errorbar(places, [row[key] for row in there], errors, label=label, marker=".", capsize=2)
    axes.tick_params(axis="x", rotation=45)
    axes.legend()


def heat_map(path: Path, cells: list[dict[str, Any]], title: str) -> None:
    """`right` of each cell of `passkey_cells`, length by depth."""
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("tokens", "depth"))
    right = {(cell["depth"], cell["tokens"]): cell["right"] for cell in cells}
    figure = new_figure(2 + 0.8 * len(lengths), 1.5 + 0.4 * len(depths))
    axes = figure.subplots()
    image = axes.imshow(
        [[right[d, n] for n in lengths] for d in depths], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto"
    )
    axes.set(title=title, xlabel="tokens", ylabel="depth (0: told first)")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    for i, d in enumerate(depths):
        for j, n in enumerate(lengths):
            axes.text(j, i, f"{right[d, n]:.2f}", ha="center", va="center")
    figure.colorbar(image)
    save(figure, path)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches; belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
