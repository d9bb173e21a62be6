"""The micro-batch that the model takes, and the torch dataset that reads it from the shards as planned."""

from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .lanes import Slices
from .mixture import MixtureReader
from .plans import BatchPlan
from .reader import TokenReader

IGNORED = -100  # the label without a loss, as in infini_train/model/cross_entropy.py


class Batch(TypedDict):
    """One micro-batch: B rows of T tokens.

    Attributes:
        input_ids: int64 [B, T], tokens.
        labels: int64 [B, T], the next token of the same document, IGNORED where there is none. They are shifted
            already.
        starts: bool [B, T], true at the first token of a document; None if no document starts in the window.
        lane_ids: int64 [B], the global number of each row's lane.
        docs: int64 [B, T], document numbers in the index; -1 at padding, which occurs in validation only.
        step_tokens: number of labels in the whole optimizer step, over all ranks and micro-batches; in validation,
            the number in this batch over all ranks.
        cursor_after: Cursor.to_dict() of the state after the whole *step*, which is therefore valid once the step's
            last micro-batch is consumed; None in validation.
        data_shares: for a mixture, the share of each dataset (by name) in all tokens read up to the end of the step.
        segment_index: int64 [B, T / segment_length], the number of each segment in its document, -1 for padding; in
            validation only.
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
    """Maps a BatchPlan to its Batch. This runs in a loader worker.

    Args:
        reader: reads tokens of the dataset.
        part, parts: under context parallelism, return only this one of so many equal parts of the batch's columns.
    """

    def __init__(self, reader: TokenReader | MixtureReader, part: int = 0, parts: int = 1):
        self.reader, self.part, self.parts = reader, part, parts

    def __getitem__(self, plan: BatchPlan) -> Batch:
        shape = len(plan.lane_ids), plan.window
        input_ids, labels, docs = np.zeros(shape, np.int64), np.full(shape, IGNORED), np.full(shape, -1)
        starts = np.zeros(shape, bool)
        self._prefetch(plan.ahead)
        filled_B = [0] * len(plan.lane_ids)  # tokens that each row has so far
        for row, doc, offset, length in zip(*(column.tolist() for column in plan.slices), strict=True):
            # One token more than the inputs, if the document has it: the label of the last input.
            continues = offset + length < self.reader.index.tokens_D[doc]
            tokens = self.reader.read(doc, offset, length + continues)
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
        if plan.segment_length:  # in validation a row holds one slice, aligned to the segments of its document
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
        """Return this rank's columns of a window that several ranks share."""
        values: dict[str, Any] = dict(batch)
        names = [
            name
            for name in ("input_ids", "labels", "docs", "starts", "segment_index")
            if values.get(name) is not None
        ]
        values |= {name: values[name].chunk(self.parts, dim=1)[self.part] for name in names}
        if "starts" in names and not values["starts"].any():  # None tells the model to take its fast path
            values["starts"] = None
        return cast(Batch, values)
