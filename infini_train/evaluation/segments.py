"""Loss by segment of long documents, with the model's own memory, with none, and with another document's.

Documents are read side by side, one a row, segment by segment: what a segment reads is then wholly what earlier
segments left, so one document's memory can be given to another. (In a window of several segments, a document's own
writes would mix with it.) Any division into windows gives the same losses, so "on" is what `infini-train validate`
computes.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from infini_train.data.datamodule import IGNORED, PlannedBatches, validation_plans
from infini_train.data.index import DatasetIndex, atomic_file, sha256_of_file
from infini_train.data.reader import TokenReader
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.memory import MemoryState

from .buckets import BUCKETS, bucket_name, bucket_of

CHUNK = 2**24  # logits held at once: 64 MiB in float32, and as much again inside cross_entropy


@dataclass
class SegmentLosses:
    """Sums over tokens, by bucket of the segment's number in its document; float64 [BUCKETS] each, nats.

    on, off: with the memory as it is; with its reads off.
    compared_on, other: with the memory as it is; with another document's, over those tokens that had another
        document beside them.
    tokens, compared: how many tokens the first and the last two sums run over.
    """

    on: Tensor
    off: Tensor
    compared_on: Tensor
    other: Tensor
    tokens: Tensor
    compared: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """Means in nats per token, a row for each bucket with tokens, and one for all; None where none compare."""
        buckets = torch.nonzero(self.tokens)[:, 0].tolist()
        return [self._row(bucket_name(b), [b]) for b in buckets] + [self._row("all", buckets)]

    def _row(self, name: str, buckets: list[int]) -> dict[str, Any]:
        def total(x: Tensor) -> float:
            return float(x[buckets].sum())

        n, compared = total(self.tokens), total(self.compared)
        return {
            "segment": name,
            "tokens": int(n),
            "on": total(self.on) / n,
            "off": total(self.off) / n,
            "off_minus_on": total(self.off - self.on) / n,
            "compared_tokens": int(compared),
            "other": total(self.other) / compared if compared else None,
            "other_minus_on": total(self.other - self.compared_on) / compared if compared else None,
        }


@torch.inference_mode()
def segment_losses(
    model: InfiniForCausalLM,
    index: DatasetIndex,
    *,
    rows: int = 8,
    documents: int | None = None,
    max_tokens: int | None = None,
) -> SegmentLosses:
    """Read documents and sum up their losses under the three conditions, as DESIGN section 2 asks for.

    In the third, row r of the n rows that still read reads the memory of row r + 1 (the last that of the first): the
    memory of a document of which just as many segments were read. Where only one row still reads, its tokens are
    not compared. Memory use does not grow with the documents' lengths.

    Args:
        model: on any device, of any float dtype; losses are summed in float64.
        index: of the documents; every token but BOS is scored, EOS too.
        rows: documents read side by side; in the order of their lengths, longest first.
        documents: only so many, the longest; None: all.
        max_tokens: only so many of each, from its start; None: all.
    """
    size, device = model.config.segment_length, model.device
    longest = np.argsort(-index.tokens_D, kind="stable")[:documents]
    plans = validation_plans(
        index.tokens_D[longest], rows=rows, rank=0, world_size=1, segment_length=size, window=size, limit=max_tokens
    )
    batches = PlannedBatches(TokenReader(index))
    sums = SegmentLosses(*(torch.zeros(BUCKETS, dtype=torch.float64) for _ in range(6)))
    memory: list[MemoryState] = []
    for plan in track(plans, "reading segments", console=Console(stderr=True)):
        segment, reading = int(plan.slices.offset[0]) // size, len(plan.slices.lane)
        assert plan.slices.lane.tolist() == list(range(reading)), "longest first, so the first rows read longest"
        batch = batches[replace(plan, slices=plan.slices._replace(doc=longest[plan.slices.doc]))]
        ids, labels = (batch[name][:reading].to(device) for name in ("input_ids", "labels"))  # type: ignore[literal-required]
        memory = [{k: x[:reading] for k, x in s.items()} for s in memory] if segment else model.init_memory(reading)

        out = model.model(ids, memory=memory)
        on = loss_sum(model, out.last_hidden_state, labels)
        with model.memory_off():
            off = loss_sum(model, model.model(ids, memory=memory).last_hidden_state, labels)
        bucket, tokens = bucket_of(segment), int((labels != IGNORED).sum())
        sums.on[bucket] += on
        sums.off[bucket] += off
        sums.tokens[bucket] += tokens
        if reading > 1:
            exchanged = [{k: x.roll(-1, 0) for k, x in s.items()} for s in memory]
            sums.other[bucket] += loss_sum(model, model.model(ids, memory=exchanged).last_hidden_state, labels)
            sums.compared_on[bucket] += on
            sums.compared[bucket] += tokens
        memory = out.memory
    return sums


def loss_sum(model: InfiniForCausalLM, hidden_BTD: Tensor, labels_BT: Tensor) -> float:
    """Sum of the cross-entropies of all labelled tokens, nats; never holds more than CHUNK logits."""
    labelled = labels_BT != IGNORED
    hidden, labels = hidden_BTD[labelled], labels_BT[labelled]
    chunk = max(1, CHUNK // model.config.vocab_size)
    total = 0.0
    for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = model.lm_head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits, y, reduction="none").double().sum().item()
    return total


def load(directory: Path, index: DatasetIndex, device: str, dtype: torch.dtype) -> InfiniForCausalLM:
    """The model of an export or import, checked against the dataset it shall read.

    Raises FileNotFoundError for no model, ValueError for another kind of model, weights that are missing, a smaller
    vocabulary than the dataset's, or another tokenizer.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: expected an exported model (no config.json in it)")
    kind = json.loads((directory / "config.json").read_bytes()).get("model_type")
    if kind != InfiniConfig.model_type:
        raise ValueError(f"{directory}: model_type: found {kind!r}, expected {InfiniConfig.model_type!r}")
    loaded: Any = InfiniForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{directory}: weights: {', '.join(missing[:5])} missing, {len(missing)} in all")
    if index.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{index.root}: vocabulary: found {index.vocab_size} tokens, "
            f"expected at most the model's {model.config.vocab_size}"
        )
    tokenizer = directory / index.tokenizer_file
    if tokenizer.is_file() and sha256_of_file(tokenizer) != index.tokenizer_sha256:
        raise ValueError(f"{tokenizer}: found another tokenizer than that of the dataset {index.root}")
    return model.to(device).eval()


def evaluate(
    directory: Path,
    dataset: Path,
    *,
    rows: int,
    documents: int | None,
    max_tokens: int | None,
    out: Path | None,
    device: str,
    dtype: str,
) -> None:
    """Load a model and a dataset, print the table of `segment_losses`, and write it to `out` as JSON.

    Raises ValueError, FileNotFoundError, FileExistsError for options and inputs that cannot be used.
    """
    least = {"rows": rows, "documents": documents, "max_tokens": max_tokens}
    if wrong := [f"{name}: found {n}, expected at least 1" for name, n in least.items() if n is not None and n < 1]:
        raise ValueError("; ".join(wrong))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: found cuda, but torch finds no such device")
    if out is not None and out.exists():
        raise FileExistsError(f"{out}: exists; name a file that does not")
    index = DatasetIndex.load(dataset)
    index.check_files()
    model = load(directory, index, device, getattr(torch, dtype))
    table = segment_losses(model, index, rows=rows, documents=documents, max_tokens=max_tokens).rows()
    show(table)
    if out is not None:
        about = {
            "model": str(directory),
            "dataset": str(dataset),
            "fingerprint": index.fingerprint,
            "segment_length": model.config.segment_length,
            "memory": model.config.memory,
            "dtype": dtype,
            **least,
        }
        with atomic_file(out) as file:
            file.write(json.dumps({**about, "segments": table}, indent=1).encode() + b"\n")


def show(table: list[dict[str, Any]]) -> None:
    """Print the rows of `SegmentLosses.rows`."""
    columns = ("segment", "tokens", "on", "off", "off - on", "compared", "other", "other - on")
    shown = Table(*columns, title="loss by segment: memory on, off, of another document; nats per token")
    for row in table:
        cells = (f"{x:,}" if isinstance(x, int) else f"{x:.4f}" if isinstance(x, float) else x for x in row.values())
        shown.add_row(*(cell or "-" for cell in cells))
    Console().print(shown)
