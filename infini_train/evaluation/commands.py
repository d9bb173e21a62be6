"""The commands `segments`, `recall` and `passkey`: each measures a model, prints tables and writes JSON and a plot.

Their arguments `subject` are the fields of Subject, which also describes the errors that they raise.
"""

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from infini_train import plots
from infini_train.data.index import DatasetIndex
from infini_train.metrics.recall import KINDS, MODES, passkey_cells, recall_counts
from infini_train.synthetic import TaskMixture, Vocabulary, synthetic_task

from .anchors import ANCHORS
from .segments import segment_losses
from .subject import Subject


def evaluate_segments(*, documents: int | None, max_tokens: int | None, anchors: bool, **subject: Any) -> None:
    """Measure losses by segment, see `segment_losses`."""
    s = Subject(**subject)
    least = {"rows": s.rows, "documents": documents, "max_tokens": max_tokens}
    if wrong := [f"{name}: found {n}, expected at least 1" for name, n in least.items() if n is not None and n < 1]:
        raise ValueError("; ".join(wrong))
    index = s.index()
    model, about = s.load(index)
    losses, use, anchored = segment_losses(
        model, index, rows=s.rows, documents=documents, max_tokens=max_tokens, anchors=anchors
    )
    rows, growth = losses.rows(), losses.growth()
    unit = f"nats per token ± standard error over {rows[-1]['documents']} documents"
    on_off = Table("segment", "tokens", "on", "off", "off - on", title=f"loss by segment, memory on and off; {unit}")
    other = Table("segment", "compared", "on", "other", "other - on", title=f"memory of another document; {unit}")
    for row in rows:
        cells = [with_error(row, key) for key in ("on", "off", "off_minus_on")]
        on_off.add_row(row["segment"], f"{row['tokens']:,}", *cells)
        if row["compared_tokens"]:
            cells = [with_error(row, key) for key in ("compared_on", "other", "other_minus_on")]
            other.add_row(row["segment"], f"{row['compared_tokens']:,}", *cells)
    names = {"off_minus_on": "off - on", "other_minus_on": "other - on"}
    grows = [f"{name} {with_error(growth, key)}" for key, name in names.items() if growth[key] is not None]
    Console().print(on_off, *([other] if other.rows else []))
    if grows:
        Console().print("growth per doubling of the segment's number, within documents: " + ", ".join(grows))
    gains = anchored.table(losses.on, losses.tokens) if anchored else None
    if gains:
        what = "gained by simple methods from what lies before the previous segment"
        shown = Table("segment", "tokens", *ANCHORS, title=f"{what}; {unit}")
        for row in gains:
            shown.add_row(row["segment"], f"{row['tokens']:,}", *(with_error(row, name) for name in ANCHORS))
        Console().print(shown)
    heads = use.table()
    if heads:
        show_heads("memory's share of the mix, by layer and head, over tokens that find something", heads["share"])
        show_heads("norm of what is read over that of local attention's output", heads["read_norm"])
    found = {"documents": documents, "max_tokens": max_tokens, "segments": rows, "growth": growth, "heads": heads}
    found |= {"anchors": gains} if anchors else {}
    s.write(about | found)
    if s.plot is not None:
        plots.save(plots.segments(rows, heads), s.plot)


def evaluate_recall(*, times: float, documents: int, seed: int, **subject: Any) -> None:
    """Measure recall, see `recall_counts`.

    The documents are `times` as long as the longest ones of the dataset's task, and use all of its keys.
    """
    s = Subject(**subject)
    if s.rows < 2:
        raise ValueError(f"rows: found {s.rows}, expected at least 2, for documents to exchange memories")
    if documents < 1 or documents % s.rows:
        raise ValueError(f"documents: found {documents}, expected a multiple of --rows, {s.rows}")
    if not 0 < times < math.inf:
        raise ValueError(f"times: found {times}, expected more than 0")
    index = s.index()
    task, vocabulary = task_of(index)
    model, about = s.load(index)
    asked = replace(task.recall, tokens=round(times * task.recall.tokens), shortest=None, fewest=None)
    counts = recall_counts(model, asked, vocabulary, count=documents, rows=s.rows, seed=seed)
    tables = {name: table for kind, name in enumerate(KINDS) if (table := counts.rows(kind))}
    for name, rows in tables.items():
        title = f"accuracy by segment, {asked.tokens:,} tokens: {KINDS[name]}"
        shown = Table("segment", "answers", *MODES, title=title)
        for row in rows:
            shown.add_row(row["segment"], f"{row['answers']:,}", *(with_error(row, mode) for mode in MODES))
        Console().print(shown)
    if not tables:
        raise ValueError(
            f"times: documents of {asked.tokens} tokens, {model.config.segment_length} a segment, ask nothing"
        )
    chance = 1 / vocabulary.values
    found = {"seed": seed, "documents": documents, "task": asdict(asked), "chance": chance, "accuracy": tables}
    s.write(about | found)
    if s.plot is not None:
        figure = plots.accuracy_lines({KINDS[name]: rows for name, rows in tables.items()}, MODES, chance)
        plots.save(figure, s.plot)


def evaluate_passkey(
    *, lengths: list[int], depths: int, samples: int, generate: bool, seed: int, **subject: Any
) -> None:
    """Measure the recall of passkeys, see `passkey_cells`, at `depths` depths spread evenly from 0 to 1."""
    s = Subject(**subject)
    least = {"rows": (s.rows, 1), "depths": (depths, 2), "samples": (samples, 1)}
    if wrong := [f"{name}: found {n}, expected at least {low}" for name, (n, low) in least.items() if n < low]:
        raise ValueError("; ".join(wrong))
    index = s.index()
    task, vocabulary = task_of(index)
    model, about = s.load(index)
    shares = np.linspace(0, 1, depths).round(3).tolist()
    how: dict[str, Any] = {"samples": samples, "rows": s.rows, "seed": seed, "generate": generate}
    cells = passkey_cells(model, task.passkey, vocabulary, lengths=lengths, depths=shares, **how)
    shown = Table(
        "depth", *(f"{n:,}" for n in lengths), title="passkeys recalled, by depth and tokens (*: not by memory alone)"
    )
    for i, depth in enumerate(shares):
        column = cells[i :: len(shares)]
        shown.add_row(f"{depth:g}", *(f"{cell['right']:.2f}{'*' if cell['local'] else ''}" for cell in column))
    Console().print(shown)
    s.write({**about, **how, "digits": task.passkey.digits, "cells": cells})
    if s.plot is not None:
        plots.save(plots.heat_map(cells, "passkeys recalled"), s.plot)


def show_heads(title: str, values: list[list[float]]) -> None:
    """Print a table of values [layers, heads], a row for each layer."""
    shown = Table("", *map(str, range(len(values[0]))), title=title)
    for layer, row in enumerate(values):
        shown.add_row(str(layer), *(f"{value:.2f}" for value in row))
    console = Console()
    console.width = max(console.width, console.measure(shown).maximum)  # a truncated number would mislead
    console.print(shown)


def task_of(index: DatasetIndex) -> tuple[TaskMixture, Vocabulary]:
    """Return the task of a synthetic dataset. Raises ValueError if `infini-train prep synth` did not make it."""
    if (found := synthetic_task(index.options)) is None:
        raise ValueError(f"{index.root}: expected a dataset that `infini-train prep synth` drew")
    return found


def with_error(row: dict[str, Any], key: str) -> str:
    """Format a value and, if there is one, its standard error."""
    return f"{row[key]:.4f}" + ("" if row[f"{key}_se"] is None else f" ± {row[f'{key}_se']:.4f}")
