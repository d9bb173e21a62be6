"""Plots of evaluations, as PNG files. matplotlib comes with the extra `eval`; nothing else needs it."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infini_train.data.index import atomic_file


def check_available() -> None:
    """Raises ValueError if there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ValueError("plot: matplotlib is not installed; pip install 'infini-train[eval]' brings it")


def accuracy_lines(path: Path, tables: dict[str, list[dict[str, Any]]], modes: Sequence[str], chance: float) -> None:
    """A panel for each table of `Counts.rows`, with a line for each mode: accuracy and standard error by segment."""
    figure = _figure(5.5 * len(tables), 4)
    for axes, (name, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        rows = [row for row in rows if row["segment"] != "all"]
        for mode in modes:
            errors = [row[f"{mode}_se"] or 0 for row in rows]
            axes.errorbar(
                [r["segment"] for r in rows], [r[mode] for r in rows], errors, label=mode, marker=".", capsize=2
            )
        axes.axhline(chance, color="grey", linestyle=":", label="chance")
        axes.set(title=name, xlabel="segment of the question", ylabel="accuracy", ylim=(-0.03, 1.03))
        axes.tick_params(axis="x", rotation=45)
        axes.legend()
    _save(figure, path)


def heat_map(path: Path, cells: list[dict[str, Any]], title: str) -> None:
    """`right` of each cell of `passkey_cells`, length by depth."""
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("tokens", "depth"))
    right = {(cell["depth"], cell["tokens"]): cell["right"] for cell in cells}
    figure = _figure(2 + 0.8 * len(lengths), 1.5 + 0.4 * len(depths))
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
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
