"""Plots of evaluations as PNG files. They need matplotlib, which is installed by the extra `eval`."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infini_train.files import atomic_file


def check_available() -> None:
    """Raise ValueError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("plot: matplotlib is not installed; pip install 'infini-train[eval]' brings it")


def accuracy_lines(path: Path, tables: dict[str, list[dict[str, Any]]], modes: Sequence[str], chance: float) -> None:
    """Plot accuracy with standard errors by segment, with a panel for each table and a line for each memory mode.

    Args:
        path: PNG file to write.
        tables: rows of `Counts.rows` by the name of the task.
        modes: keys of the accuracies in a row.
        chance: accuracy of guessing, drawn as a dotted line.
    """
    figure = new_figure(5.5 * len(tables), 4)
    for axes, (name, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        axes.axhline(chance, color="grey", linestyle=":", label="chance")
        axes.set(title=name, xlabel="segment of the question", ylabel="accuracy", ylim=(-0.03, 1.03))
        _lines(axes, rows, {mode: mode for mode in modes})
    save(figure, path)


def segments(path: Path, rows: list[dict[str, Any]], heads: dict[str, list[list[float]]] | None) -> None:
    """Plot the loss by segment for three states of the memory (on, off, of another document) and its benefit.

    Args:
        path: PNG file to write.
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
            image = axes.imshow(heads[key], vmin=0, vmax=1 if key == "share" else None, aspect="auto")
            axes.set(title=title, xlabel="head", ylabel="layer")
            axes.locator_params(integer=True)
            figure.colorbar(image)
    save(figure, path)


def _lines(axes: Any, rows: list[dict[str, Any]], names: dict[str, str]) -> None:
    """Plot the value of each key of `names` by segment with error bars; values that are None are left out."""
    rows = [row for row in rows if row["segment"] != "all"]
    for key, label in names.items():
        known = [row for row in rows if row[key] is not None]
        segments, errors = [row["segment"] for row in known], [row[f"{key}_se"] or 0 for row in known]
        axes.errorbar(segments, [row[key] for row in known], errors, label=label, marker=".", capsize=2)
    axes.tick_params(axis="x", rotation=45)
    axes.legend()


def heat_map(path: Path, cells: list[dict[str, Any]], title: str) -> None:
    """Plot the accuracy of each cell of `passkey_cells` as a heat map of depth by length."""
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("tokens", "depth"))
    accuracy = {(cell["depth"], cell["tokens"]): cell["right"] for cell in cells}
    figure = new_figure(2 + 0.8 * len(lengths), 1.5 + 0.4 * len(depths))
    axes = figure.subplots()
    image = axes.imshow(
        [[accuracy[d, n] for n in lengths] for d in depths], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto"
    )
    axes.set(title=title, xlabel="tokens", ylabel="depth (0: passkey at the beginning)")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    for i, d in enumerate(depths):
        for j, n in enumerate(lengths):
            axes.text(j, i, f"{accuracy[d, n]:.2f}", ha="center", va="center")
    figure.colorbar(image)
    save(figure, path)


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, with its size in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, complete or not at all."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
