"""One micro-batch as the model takes it, and the dataset that reads it as planned."""

from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .lanes import Slices
from .mixture import MixtureReader
from .plans import Plan
from .reader import TokenReader

IGNORED = -100  # the label that torch's cross_entropy skips


class Batch(TypedDict):
    """One micro-batch: B rows of T tokens.

    input_ids: int64 [B, T].
    labels: int64 [B, T], the next token of the same document, IGNORED where there is none; already shifted.
    starts: bool [B, T], first tokens of documents; None if the window has none.
    lane_ids: int64 [B], global numbers of the rows.
    docs: int64 [B, T], document numbers in the index, -1 for padding (validation only).
    step_tokens: labels of the whole optimizer step, over all ranks and micro-batches; in validation, those of this
        batch over all ranks.
    cursor_after: Cursor.to_dict() of the state after the whole *step*, so true once its last micro-batch is consumed.
        None in validation.
    data_shares: of a mixture, the share of each dataset in all tokens read after the step, by its name.
    segment_index: validation only, int64 [B, T / segment_length]: which segment of its document, -1 for padding.
    """

    input_ids: Tensor
    labels: Tensor
    starts: Tensor | None
    lane_ids: Tensor
    docs: Tensor
    step_tokens: int
    cursor_after: dict[str, Any] | None
    data_shares: NotRequired[dict[str, float]]
    segment_index: NotRequired[Tensor]


class PlannedBatches(Dataset[Batch]):
    """Maps a Plan to its Batch, or one of several equal parts of its columns; what a worker runs."""

    def __init__(self, reader: TokenReader | MixtureReader, part: int = 0, parts: int = 1):
        self.reader, self.part, self.parts = reader, part, parts

    def __getitem__(self, plan: Plan) -> Batch:
        shape = len(plan.lane_ids), plan.window
        input_ids, labels, docs = np.zeros(shape, np.int64), np.full(shape, IGNORED), np.full(shape, -1)
        starts = np.zeros(shape, bool)
        filled_B = [0] * len(plan.lane_ids)
        self._prefetch(plan.ahead)
        for row, doc, offset, length in zip(*(column.tolist() for column in plan.slices), strict=True):
            goes_on = offset + length < self.reader.index.tokens_D[doc]
            tokens = self.reader.read(doc, offset, length + goes_on)
            t = filled_B[row]
            filled_B[row] += length
            input_ids[row, t : t + length] = tokens[:length]
            labels[row, t : t + len(tokens) - 1] = tokens[1:]
            docs[row, t : t + length] = doc
            starts[row, t] = offset == 0
        batch = Batch(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            starts=torch.from_numpy(starts) if starts.any() else None,
            lane_ids=torch.from_numpy(plan.lane_ids),
            docs=torch.from_numpy(docs),
            step_tokens=plan.step_tokens,
            cursor_after=plan.cursor_after,
        )
        if plan.data_shares is not None:
            batch["data_shares"] = plan.data_shares
        if plan.segment_length:  # each row holds one slice, aligned to its document's segments
            segments = np.full((shape[0], shape[1] // plan.segment_length), -1)
            for row, offset, length in zip(plan.slices.lane, plan.slices.offset, plan.slices.length, strict=True):
                n = -(-length // plan.segment_length)
                segments[row, :n] = offset // plan.segment_length + np.arange(n)
            batch["segment_index"] = torch.from_numpy(segments)
        return batch if self.parts == 1 else self._part_of(batch)

    def _prefetch(self, slices: Slices | None) -> None:
        if slices is None:
            return
        for doc, offset, length in zip(*(column.tolist() for column in slices[1:]), strict=True):
            self.reader.prefetch(doc, offset, length + (offset + length < self.reader.index.tokens_D[doc]))

    def _part_of(self, batch: Batch) -> Batch:
        """This rank's columns of a window that several share."""
        values: dict[str, Any] = dict(batch)
        names = [
            name
            for name in ("input_ids", "labels", "docs", "starts", "segment_index")
            if values.get(name) is not None
        ]
        values |= {name: values[name].chunk(self.parts, dim=1)[self.part] for name in names}
        if "starts" in names and not values["starts"].any():
            values["starts"] = None
        return cast(Batch, values)
