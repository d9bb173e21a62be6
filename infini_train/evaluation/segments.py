"""Measures loss by segment of long documents: with the memory, without it, and with another document's memory.

Documents are read side by side, one in each row and one segment at a time. A segment then reads nothing but what
earlier calls have left, so that it can be given another document's memory. (In a window of several segments, it would
also read what the document's own earlier segments wrote.) The division into windows does not change the losses, so
"on" is what `infini-train validate` computes.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from infini_train.data.batches import IGNORED, PlannedBatches
from infini_train.data.index import DatasetIndex
from infini_train.data.plans import validation_plans
from infini_train.data.remote import reader_of
from infini_train.metrics.buckets import bucket_name, bucket_of
from infini_train.metrics.memory_use import MemoryUse
from infini_train.metrics.ratios import ratio
from infini_train.model import InfiniForCausalLM
from infini_train.model.memory_rule import MemoryState

from .anchors import Anchors


@dataclass
class SegmentLosses:
    """Sums of losses in nats, float64 [buckets, D], by bucket of the segment's number in its document, and document.

    Attributes:
        on: with the memory.
        off: without reading the memory.
        compared_on: with the memory, over those tokens that had another document beside them.
        other: with that document's memory, over the same tokens.
        tokens: number of tokens in `on` and `off`.
        compared: number of tokens in `compared_on` and `other`.
    """

    on: NDArray[np.float64]
    off: NDArray[np.float64]
    compared_on: NDArray[np.float64]
    other: NDArray[np.float64]
    tokens: NDArray[np.float64]
    compared: NDArray[np.float64]

    def rows(self) -> list[dict[str, Any]]:
        """Return means in nats per token with their standard errors over documents (NAME_se).

        There is a row for each bucket with tokens, and one for all. Means over no tokens are None, and so are the
        standard errors of a single document.
        """
        buckets = np.flatnonzero(self.tokens.sum(1)).tolist()
        return [self._row(bucket_name(b), [b]) for b in buckets] + [self._row("all", buckets)]

    def _row(self, name: str, buckets: list[int]) -> dict[str, Any]:
        tokens_D, compared_D = self.tokens[buckets].sum(0), self.compared[buckets].sum(0)
        row: dict[str, Any] = {"segment": name, "documents": int((tokens_D > 0).sum()), "tokens": int(tokens_D.sum())}

        def add(count_D: NDArray, **sums_BD: NDArray) -> None:
            for key, sum_BD in sums_BD.items():
                some = count_D.any()
                row[key], row[f"{key}_se"] = ratio(sum_BD[buckets].sum(0), count_D) if some else (None, None)

        add(tokens_D, on=self.on, off=self.off, off_minus_on=self.off - self.on)
        row["compared_tokens"] = int(compared_D.sum())
        add(compared_D, compared_on=self.compared_on, other=self.other, other_minus_on=self.other - self.compared_on)
        return row

    def growth(self) -> dict[str, Any]:
        """Return by how much `off - on` and `other - on` grow with each doubling of the segment's number.

        This is the least-squares slope over tokens, with an intercept for each document, so that properties of long
        documents do not count as growth. Segment 0 is excluded, because all differences are 0 there. The slope is
        None if no document has tokens in two other buckets.
        """
        result: dict[str, Any] = {}
        differences = {
            "off_minus_on": (self.off - self.on, self.tokens),
            "other_minus_on": (self.other - self.compared_on, self.compared),
        }
        for name, (sum_BD, count_BD) in differences.items():
            sum_BD, count_BD = sum_BD[1:], count_BD[1:]
            x_B1 = np.arange(len(count_BD))[:, None]
            away_BD = x_B1 - (x_B1 * count_BD).sum(0) / count_BD.sum(0).clip(1)  # deviation from the document's mean
            spread_D = (count_BD * away_BD**2).sum(0)
            some = (spread_D > 0).any()
            result[name], result[f"{name}_se"] = ratio((away_BD * sum_BD).sum(0), spread_D) if some else (None, None)
        return result


@torch.inference_mode()
def segment_losses(
    model: InfiniForCausalLM,
    index: DatasetIndex,
    *,
    rows: int = 8,
    documents: int | None = None,
    max_tokens: int | None = None,
    anchors: bool = False,
) -> tuple[SegmentLosses, MemoryUse, Anchors | None]:
    """Sum up the losses of documents under the three conditions, and measure how heads use the memory in the first.

    In the third condition, row r of the n rows that still have tokens reads the memory of row r + 1 (the last one
    that of the first). That memory is of a document of which equally many segments have been read. If only one row
    has tokens left, they are not compared. What this takes in RAM does not grow with the
    documents' length, unless anchors are asked for.

    Args:
        model: the model, on any device and of any float dtype; losses are summed in float64.
        index: index of the documents. Every token except BOS is scored, including EOS.
        rows: documents read side by side, in order of their lengths, longest first.
        documents: use only this many documents, the longest ones; None: all.
        max_tokens: use only this many tokens from the start of each document; None: all.
        anchors: also measure what simple methods find in the same past (anchors.py).

    Returns:
        the sums of losses, the use of the memory by head, and the anchors' losses if asked for.
    """
    size, device = model.config.segment_length, model.device
    longest = np.argsort(-index.tokens_D, kind="stable")[:documents]
    plans = validation_plans(
        index.tokens_D[longest], rows=rows, rank=0, world_size=1, segment_length=size, window=size, limit=max_tokens
    )
    batches = PlannedBatches(reader_of(index))
    buckets = 1 + max(bucket_of(int(plan.slices.offset[0]) // size) for plan in plans)
    sums = SegmentLosses(*(np.zeros((buckets, len(longest))) for _ in range(6)))
    use, anchored = MemoryUse(model), Anchors(model, buckets, len(longest)) if anchors else None
    memory: list[MemoryState] = []
    for plan in track(plans, "reading segments", console=Console(stderr=True)):
        segment, reading = int(plan.slices.offset[0]) // size, len(plan.slices.lane)
        assert plan.slices.lane.tolist() == list(range(reading)), "longest first, so the last rows end first"
        batch = batches[replace(plan, slices=plan.slices._replace(doc=longest[plan.slices.doc]))]
        ids, labels = (x[:reading].to(device) for x in (batch["input_ids"], batch["labels"]))
        memory = [{k: x[:reading] for k, x in s.items()} for s in memory] if segment else model.init_memory(reading)

        # First with each document's own memory, which is carried to the next segment. Rows that have ended are the
        # last ones, so the first `reading` rows are the same documents as before.
        with use.counting(model, batch["docs"][:reading].to(device) >= 0):
            out = model.token_losses(ids, labels, memory=memory)
        on = row_sums(out.losses)
        if anchored is not None:
            logits = model(ids, memory=memory).logits
            anchored.read(out.last_hidden_state, logits, labels, segment, bucket_of(segment), plan.slices.doc)
        with model.memory_off():  # then without reading any memory
            off = row_sums(model.token_losses(ids, labels, memory=memory).losses)
        here, tokens = (bucket_of(segment), plan.slices.doc), (labels != IGNORED).sum(1).cpu().numpy()
        sums.on[here] += on
        sums.off[here] += off
        sums.tokens[here] += tokens
        if reading > 1:  # then with the memory of the next row's document
            other = model.with_memory_of_next_row(memory)
            sums.other[here] += row_sums(model.token_losses(ids, labels, memory=other).losses)
            sums.compared_on[here] += on
            sums.compared[here] += tokens
        assert out.memory is not None
        memory = out.memory
    return sums, use, anchored


def row_sums(losses_BT: Tensor) -> NDArray[np.float64]:
    """Return the sum of each row's losses, float64 [B]."""
    return losses_BT.double().sum(1).cpu().numpy()
