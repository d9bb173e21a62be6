"""Which tokens every micro-batch of a rank will hold: plans that the main process makes, and workers carry out."""

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
class Plan:
    """What one micro-batch will hold. slices.lane counts rows of this micro-batch, from 0."""

    slices: Slices
    lane_ids: Ints
    window: int
    step_tokens: int
    cursor_after: dict[str, Any] | None = None
    data_shares: dict[str, float] | None = None
    segment_length: int | None = None  # set in validation
    ahead: Slices | None = None  # of a later micro-batch: what a reader may begin to fetch


class LanePlans(Sampler[Plan]):
    """This rank's micro-batches of a run, from the scheduler's cursor to the last step.

    Its length is that of the *whole run*, not of what is left: Lightning restores the number of micro-batches done
    and compares it with the length. (It needs one: a loader without is prefetched by a batch.)
    """

    def __init__(
        self,
        scheduler: LaneScheduler,
        max_steps: int,
        rank: int,
        world_size: int,
        accumulate: int,
        names: list[str] | None = None,  # of a mixture's datasets
        ahead: int = 0,  # steps that plans are made before they are given out, with what they hold announced
    ):
        self.scheduler, self.max_steps, self.accumulate, self.names = scheduler, max_steps, accumulate, names
        self.ahead = ahead
        self.rows = len(scheduler.doc_L) // (world_size * accumulate)
        self.first_lane = rank * accumulate * self.rows
        self.used = False

    def __len__(self) -> int:
        return self.max_steps * self.accumulate

    def __iter__(self) -> Iterator[Plan]:
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

    def _plans(self) -> Iterator[Plan]:
        for _ in range(self.scheduler.step, self.max_steps):
            (lane, *rest), labels = self.scheduler.next_step()
            cursor_after, shares = self.scheduler.cursor.to_dict(), None
            if self.names:
                read = self.scheduler.tokens_read()
                shares = {name: n / sum(read) for name, n in zip(self.names, read, strict=True)}
            for group in range(self.accumulate):
                first = self.first_lane + group * self.rows
                low, high = np.searchsorted(lane, [first, first + self.rows])
                yield Plan(
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
) -> list[Plan]:
    """This rank's micro-batches that read every document once, one a row, from its start, window after window.

    Rows of all ranks take documents together, longest first, and go on to the next ones together: little padding,
    and as many batches on every rank. limit: only this many tokens of each document; parts: of equal
    numbers of segments, into which every micro-batch can be cut.
    """
    unit = segment_length * parts
    length_D = np.minimum(tokens_D, limit) if limit else tokens_D
    order_D = np.argsort(-length_D, kind="stable")
    mine = slice(rank * rows, (rank + 1) * rows)
    plans = []
    for group in range(0, len(order_D), rows * world_size):
        doc_R = order_D[group : group + rows * world_size]
        longest = int(length_D[doc_R[0]])
        for offset in range(0, longest, window):
            columns = min(window, -(-(longest - offset) // unit) * unit)
            read_R = np.clip(length_D[doc_R] - offset, 0, columns)
            labels = read_R.sum() - np.sum((read_R > 0) & (offset + read_R == tokens_D[doc_R]))
            row = np.flatnonzero(read_R[mine])
            plans.append(
                Plan(
                    slices=Slices(row, doc_R[mine][row], np.full(len(row), offset), read_R[mine][row]),
                    lane_ids=np.arange(mine.start, mine.stop),
                    window=columns,
                    step_tokens=int(labels),
                    segment_length=segment_length,
                )
            )
    return plans
