"""`recall` and `passkey`: load a model, measure what it recalls, print a table, write JSON and a plot."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from infini_train.data.index import DatasetIndex, atomic_file
from infini_train.model import InfiniForCausalLM
from infini_train.model.loading import fitting
from infini_train.training.checkpoint import check, latest, read_model

from . import plots, segments
from .recall import KINDS, MODES, passkey_cells, recall_counts
from .synthetic import Mixture, Vocabulary, described


def load(path: Path, index: DatasetIndex, device: str, dtype: torch.dtype) -> InfiniForCausalLM:
    """The model of an export, a checkpoint, or the latest of a run's `checkpoints`; raises as segments.load."""
    if (path / "config.json").is_file():
        return segments.load(path, index, device, dtype)
    checkpoint = latest(path) or path
    check(checkpoint)
    config, weights = read_model(checkpoint)
    if index.vocab_size > config.vocab_size:
        raise ValueError(
            f"{index.root}: vocabulary: found {index.vocab_size} tokens, "
            f"expected at most the model's {config.vocab_size}"
        )
    model: Any = InfiniForCausalLM(config)  # its `to` is typed too narrowly
    model.load_state_dict(fitting(weights, config, checkpoint))
    return model.to(device, dtype).eval()


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and where the result goes.

    Args:
        directory: an export, a checkpoint, or a run's `checkpoints`.
        dataset: of `data_prep synth`; documents are drawn as its were.
        rows: documents read side by side.
        seed: of the documents.
        out, plot: JSON and PNG to write; None: neither.
    """

    directory: Path
    dataset: Path
    rows: int
    seed: int
    out: Path | None
    plot: Path | None
    device: str
    dtype: str

    def load(self) -> tuple[InfiniForCausalLM, Mixture, Vocabulary, dict[str, Any]]:
        """The model, what the dataset drew, and what the JSON says of both.

        Raises ValueError, FileNotFoundError, FileExistsError for what cannot be used.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: found cuda, but torch finds no such device")
        for path in (self.out, self.plot):
            if path is not None and path.exists():
                raise FileExistsError(f"{path}: exists; name a file that does not")
        if self.plot is not None:
            plots.check_available()
        index = DatasetIndex.load(self.dataset)
        index.check_files()
        if (drawn := described(index.options)) is None:
            raise ValueError(f"{self.dataset}: expected a dataset that `data_prep synth` drew")
        model = load(self.directory, index, self.device, getattr(torch, self.dtype))
        about = {
            "model": str(self.directory),
            "dataset": str(self.dataset),
            "fingerprint": index.fingerprint,
            "segment_length": model.config.segment_length,
            "memory": model.config.memory,
            "dtype": self.dtype,
            "seed": self.seed,
        }
        return model, *drawn, about

    def write(self, result: dict[str, Any]) -> None:
        if self.out is not None:
            with atomic_file(self.out) as file:
                file.write(json.dumps(result, indent=1).encode() + b"\n")


def evaluate_recall(*, times: float, documents: int, **subject: Any) -> None:
    """Print `recall_counts` of documents `times` as long as the dataset's longest, all keys in use; write JSON, PNG.

    Other arguments, and what is raised: see Subject.
    """
    s = Subject(**subject)
    if s.rows < 2:
        raise ValueError(f"rows: found {s.rows}, expected at least 2, for documents to exchange memories")
    if documents < 1 or documents % s.rows:
        raise ValueError(f"documents: found {documents}, expected a multiple of rows, {s.rows}")
    model, task, vocabulary, about = s.load()
    asked = replace(task.recall, tokens=round(times * task.recall.tokens), shortest=None, fewest=None)
    counts = recall_counts(model, asked, vocabulary, count=documents, rows=s.rows, seed=s.seed)
    tables = {name: table for kind, name in enumerate(KINDS) if (table := counts.rows(kind))}
    for name, rows in tables.items():
        title = f"accuracy by segment, {asked.tokens:,} tokens: {KINDS[name]}"
        shown = Table("segment", "answers", *MODES, title=title)
        for row in rows:
            cells = (
                f"{row[mode]:.4f}" + (f" ± {se:.4f}" if (se := row[f"{mode}_se"]) is not None else "")
                for mode in MODES
            )
            shown.add_row(row["segment"], f"{row['answers']:,}", *cells)
        Console().print(shown)
    if not tables:
        raise ValueError(
            f"times: documents of {asked.tokens} tokens, {model.config.segment_length} a segment, ask nothing"
        )
    chance = 1 / vocabulary.values
    s.write({**about, "documents": documents, "task": asdict(asked), "chance": chance, "accuracy": tables})
    if s.plot is not None:
        plots.accuracy_lines(s.plot, {KINDS[name]: rows for name, rows in tables.items()}, MODES, chance)


def evaluate_passkey(*, lengths: list[int], depths: int, samples: int, **subject: Any) -> None:
    """Print `passkey_cells` at so many depths, evenly from 0 to 1; write JSON, PNG.

    Other arguments, and what is raised: see Subject.
    """
    s = Subject(**subject)
    least = {"rows": (s.rows, 1), "depths": (depths, 2), "samples": (samples, 1)}
    if wrong := [f"{name}: found {n}, expected at least {low}" for name, (n, low) in least.items() if n < low]:
        raise ValueError("; ".join(wrong))
    model, task, vocabulary, about = s.load()
    shares = np.linspace(0, 1, depths).round(3).tolist()
    cells = passkey_cells(
        model, task.passkey, vocabulary, lengths=lengths, depths=shares, samples=samples, rows=s.rows, seed=s.seed
    )
    shown = Table(
        "depth", *(f"{n:,}" for n in lengths), title="passkeys recalled, by depth and tokens (*: not by memory alone)"
    )
    for i, depth in enumerate(shares):
        column = cells[i :: len(shares)]
        shown.add_row(f"{depth:g}", *(f"{cell['right']:.2f}" + "*" * cell["local"] for cell in column))
    Console().print(shown)
    s.write({**about, "samples": samples, "digits": task.passkey.digits, "cells": cells})
    if s.plot is not None:
        plots.heat_map(s.plot, cells, "passkeys recalled")
