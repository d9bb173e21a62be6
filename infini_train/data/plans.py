"""Plans of one rank's micro-batches. The main process makes them, and loader workers read the tokens they name."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from .lanes import LaneScheduler, Slices
from .queue import Ints


@dataclass(frozen=True)
class BatchPlan:
    """What one micro-batch will hold.

    Attributes:
        slices: the tokens to read; `slices.lane` is the row in this micro-batch, from 0.
        lane_ids: int64 [rows], the global number of each row's lane.
        window: tokens of a row; what the slices leave of it is padding (in validation only).
        step_tokens, cursor_after, data_shares: fields of the `Batch`, see there.
        segment_length: tokens of a segment; set in validation only, where segments are numbered.
        ahead: slices of a later micro-batch, which a reader may start to fetch now.
    """

    slices: Slices
    lane_ids: Ints
    window: int
    step_tokens: int
    cursor_after: dict[str, Any] | None = None
    data_shares: dict[str, float] | None = None
    segment_length: int | None = None
    ahead: Slices | None = None


class LanePlans(Sampler[BatchPlan]):
    """Yields this rank's micro-batches of a training run, from the scheduler's cursor to the last step.

    The length is that of the *whole run*, not of its remainder, because Lightning restores the number of
    micro-batches done and compares it with the length. There has to be a length: Lightning prefetches a batch from a
    loader without one, and the checkpoint would then hold the wrong cursor.

    Args:
        scheduler: the lanes of all ranks.
        max_steps: optimizer steps of the whole run.
        rank: this rank, among those that read different lanes.
        world_size: number of such ranks.
        accumulate: micro-batches of a step on each rank.
        names: names of a mixture's datasets, for `data_shares`; None: not a mixture.
        ahead: number of steps by which plans are made before they are yielded, so that each can announce what a later
            one will read.
    """

    def __init__(
        self,
        scheduler: LaneScheduler,
        max_steps: int,
        rank: int,
        world_size: int,
        accumulate: int,
        names: list[str] | None = None,
        ahead: int = 0,
    ):
        self.scheduler, self.max_steps, self.accumulate, self.names = scheduler, max_steps, accumulate, names
        self.ahead = ahead
        self.rows = len(scheduler.doc_L) // (world_size * accumulate)
        self.first_lane = rank * accumulate * self.rows
        self.used = False

    def __len__(self) -> int:
        return self.max_steps * self.accumulate

    def __iter__(self) -> Iterator[BatchPlan]:
        if self.used:
            raise RuntimeError(
                f"all {len(self)} training micro-batches are used up, but Lightning asks for more: its global_step "
                f"is behind the {self.max_steps} steps that were read"
            )
        self.used = True
        plans = self._plans()
        if not self.ahead:
            yield from plans
            return
        waiting = deque(islice(plans, self.ahead * self.accumulate))
        for plan in plans:
            waiting.append(plan)
            yield replace(waiting.popleft(), ahead=plan.slices)
        yield from waiting

    def _plans(self) -> Iterator[BatchPlan]:
        # A rank has `accumulate * rows` consecutive lanes. Its micro-batches of a step take turns over them.
        for _ in range(self.scheduler.step, self.max_steps):
            (lane, *rest), labels = self.scheduler.next_step()
            cursor_after, shares = self.scheduler.cursor.to_dict(), None
            if self.names:
                read = self.scheduler.tokens_read()
                shares = {name: n / sum(read) for name, n in zip(self.names, read, strict=True)}
            for group in range(self.accumulate):
                first = self.first_lane + group * self.rows
                low, high = np.searchsorted(lane, [first, first + self.rows])  # slices are sorted by lane
                yield BatchPlan(
                    slices=Slices(lane[low:high] - first, *(column[low:high] for column in rest)),
                    lane_ids=np.arange(first, first + self.rows),
                    window=self.scheduler.window,
                    step_tokens=labels,
                    cursor_after=cursor_after,
                    data_shares=shares,
                )


def validation_plans(
    tokens_D: np.ndarray,
    *,
    rows: int,
    rank: int,
    world_size: int,
    segment_length: int,
    window: int,
    limit: int | None,
    parts: int = 1,
) -> list[BatchPlan]:
    """Return this rank's validation micro-batches, which read every document once, window after window.

    Each row reads one document from its start. The rows of all ranks take documents together, longest first, and move
    on to the next ones together. There is then little padding, and every rank has the same number of batches.

    Args:
        tokens_D: int64 [documents], tokens of each document.
        rows: rows of a micro-batch.
        rank: this rank, among those that read different documents.
        world_size: number of such ranks.
        segment_length: tokens of a segment.
        window: tokens of a row in one micro-batch, at most.
        limit: read only this many tokens of each document; None: all.
        parts: every micro-batch can be split into this many parts with equal numbers of segments.
    """
    unit = segment_length * parts
    length_D = np.minimum(tokens_D, limit) if limit else tokens_D
    order_D = np.argsort(-length_D, kind="stable")
    mine = slice(rank * rows, (rank + 1) * rows)
    plans = []
    for group in range(0, len(order_D), rows * world_size):
        doc_R = order_D[group : group + rows * world_size]  # one document for each row of all ranks
        longest = int(length_D[doc_R[0]])
        for offset in range(0, longest, window):
            columns = min(window, -(-(longest - offset) // unit) * unit)  # the last window may be shorter
            read_R = np.clip(length_D[doc_R] - offset, 0, columns)
            # The last token of a document has no label.
            labels = read_R.sum() - np.sum((read_R > 0) & (offset + read_R == tokens_D[doc_R]))
            row = np.flatnonzero(read_R[mine])
            plans.append(
                BatchPlan(
                    slices=Slices(row, doc_R[mine][row], np.full(len(row), offset), read_R[mine][row]),
                    lane_ids=np.arange(mine.start, mine.stop),
                    window=columns,
                    step_tokens=int(labels),
                    segment_length=segment_length,
                )
            )
    return plans
