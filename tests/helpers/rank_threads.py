"""Ranks that share windows, as threads of this process: what crosses ranks passes through queues, and is counted."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from threading import Barrier
from typing import Any

from torch import Tensor

from infini_train.model.context import ContextGroup, Transfers

TIMEOUT = 60  # seconds after which a rank that waits for another one fails


class Ranks:
    """What the threads share: a queue for each pair of ranks, and what is needed for a sum."""

    def __init__(self, count: int):
        self.count = count
        self.queues = {(source, to): Queue[Tensor]() for source in range(count) for to in range(count)}
        self.barrier, self.parts = Barrier(count, timeout=TIMEOUT), dict[int, Tensor]()

    def run(self, job: Callable[["ThreadContext"], Any]) -> list[Any]:
        """The results of a job that every rank runs, in the order of ranks."""
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(job, [ThreadContext(None, self, rank) for rank in range(self.count)]))


@dataclass(frozen=True)
class ThreadContext(ContextGroup):
    """The group as one thread sees it.

    Attributes:
        ranks: what the threads share.
        number: this thread's rank.
        sent: the tensors that this rank has sent.
        received: those that it has received.
    """

    ranks: Ranks
    number: int
    sent: list[Tensor] = field(default_factory=list, compare=False)
    received: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def rank(self) -> int:
        return self.number

    @property
    def last(self) -> int:
        return self.ranks.count - 1

    def transfer(self, sends: Transfers, receives: Transfers) -> None:
        for x, rank in sends:
            assert x.is_contiguous()
            self.sent.append(x.detach().clone())
            self.ranks.queues[self.number, rank].put(self.sent[-1])
        for x, rank in receives:
            assert x.is_contiguous()
            x.copy_(self.ranks.queues[rank, self.number].get(timeout=TIMEOUT))
            self.received.append(x)

    def sum_(self, x: Tensor) -> None:
        self.ranks.parts[self.number] = x.clone()
        self.ranks.barrier.wait()
        x.copy_(sum(self.ranks.parts[rank] for rank in range(self.ranks.count)))
        self.ranks.barrier.wait()
