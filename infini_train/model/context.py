"""Context parallelism over the memory: the segments of a window spread over the ranks of a group.

Each rank processes consecutive segments as if they were a window of their own. All it needs from the others is the
state before its first segment, so the states travel along the ranks. A rank composes what its segments do to a state,
one small map, and waits for the state of the rank before. It applies the map and sends the result to the next rank.
In backward, the gradients of the states travel the other way. At the end of the window the last rank sends the states
to the first one, which starts the next window with them.

In each pass a rank thus sends and receives one state per layer, and it never holds more than its own map, whatever
the number of ranks and tokens. An all-gather of the maps (LASP-2, arXiv 2502.07563) puts those of all ranks on every
rank, and a scan by recursive doubling makes each rank send log2(ranks) maps, which can be twice as large as a state.
Both have fewer steps in a row, but a rank waits for one neighbour only, and that for the same layer: it runs a few
steps behind this neighbour in all layers alike, so that the steps delay a pass once rather than in every layer. (With
ZeRO-3, which gathers the weights of each layer from all ranks, they delay every layer.)

No rank waits for ever: all ranks take part in the same exchanges in the same order, autograd runs them in the reverse
order in backward, and within an exchange a rank waits only for ranks on one side of it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import P2POp, ProcessGroup, get_rank, get_world_size

State = dict[str, Tensor]  # as of a layer or of the output memory
Transfers = Sequence[tuple[Tensor, int]]  # tensors, each with the rank that it goes to or comes from


class _Received(AbstractContextManager[None]):
    """Within this context, exchanges append to `tensors` what they receive, or, with `repeat`, take it from there."""

    current: ClassVar[ContextVar["_Received | None"]] = ContextVar("current", default=None)

    def __init__(self, tensors: list[Tensor], repeat: bool):
        self.tensors, self.repeat = tensors, repeat

    def __enter__(self) -> None:
        self.next = iter(self.tensors)
        self.token = self.current.set(self)

    def __exit__(self, *exception: object) -> None:
        self.current.reset(self.token)


def exchanged_once() -> tuple[_Received, _Received]:
    """A `context_fn` of `torch.utils.checkpoint`: the recomputation takes what the forward pass has received.

    Otherwise the recomputation would exchange all of it again. What is kept is one state per layer.
    """
    tensors: list[Tensor] = []
    return _Received(tensors, repeat=False), _Received(tensors, repeat=True)


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share windows, in the order of their segments.

    The methods are exchanges that all ranks of the group call. `torch.compile` leaves them out of its graphs, because
    it may reorder what is in a graph, and not alike on all ranks.
    """

    group: ProcessGroup

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return get_rank(self.group)

    @property
    def last(self) -> int:
        """The number of the last rank."""
        return get_world_size(self.group) - 1

    def exchange(self, sends: Transfers, receives: Transfers) -> None:
        """Send contiguous tensors to ranks of the group, and fill others with what ranks send."""
        received = _Received.current.get()
        if received is not None and received.repeat:
            for x, _ in receives:
                x.copy_(next(received.next))
            return
        if sends or receives:
            self.transfer(sends, receives)
        if received is not None:
            received.tensors += [x.detach() for x, _ in receives]  # without the graph, which refers to this list

    def transfer(self, sends: Transfers, receives: Transfers) -> None:
        """Carry out an exchange, and wait for its end."""
        ops = [
            P2POp(op, x, group=self.group, tag=tag, group_peer=rank)
            for op, transfers in ((distributed.isend, sends), (distributed.irecv, receives))
            for tag, (x, rank) in enumerate(transfers)
        ]
        for work in distributed.batch_isend_irecv(ops):
            work.wait()

    def sum_(self, x: Tensor) -> None:
        """Replace a contiguous tensor by its sum over the ranks."""
        distributed.all_reduce(x, group=self.group)

    # ---- differentiable

    @torch.compiler.disable
    def carried(
        self, initial: Tensor, added: Tensor, keep_b: Tensor | None, transition: Tensor | None = None
    ) -> Tensor:
        """The state before this rank's segments.

        Args:
            initial: the state before the window, [b, ...], which only the first rank reads.
            added, transition: the segments of this rank turn a state into `transition @ state + added`, or, without
                `transition`, into `state + added`.
            keep_b: bool [b]; where false they turn any state, even an infinite one, into `added`. None: all true.

        Returns:
            [b, ...].
        """
        return _Carried.apply(self, initial, added, keep_b, transition)

    @torch.compiler.disable
    def shifted(self, initial: Tensor, own: Tensor) -> Tensor:
        """What the rank before has passed as `own`; `initial` on the first rank.

        For states that a rank replaces: unlike in `carried`, no rank has to wait before it sends.
        """
        return _Shifted.apply(self, initial, own)

    @torch.compiler.disable
    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks."""
        return _Mean.apply(self, x)

    # ---- not differentiable

    def from_rank_before(self, initial: Tensor) -> Tensor:
        """What the rank before has sent with `to_rank_after`; `initial` on the first rank."""
        if self.rank == 0:
            return initial
        received = torch.empty_like(initial, memory_format=torch.contiguous_format)
        self.exchange([], [(received, self.rank - 1)])
        return received

    def to_rank_after(self, state: Tensor) -> None:
        """Send a state to the next rank."""
        if self.rank < self.last:
            self.exchange([(state.contiguous(), self.rank + 1)], [])

    @torch.no_grad()
    def after_window(self, given: list[State], after: list[State]) -> list[State]:
        """The states after the window.

        Args:
            given: the states before the window.
            after: the states after this rank's segments, each with the same entries on all ranks.

        Returns:
            on the first rank those that the last rank has as `after`; on the others `given`, because they will
            receive what they need of the next window's states.
        """
        if self.last == 0:
            return after
        if self.rank == self.last:
            self.exchange([(x.detach().contiguous(), 0) for state in after for x in state.values()], [])
        if self.rank:
            return given
        received = [
            {name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in state.items()}
            for state in after
        ]
        self.exchange([], [(x, self.last) for state in received for x in state.values()])
        return received


class _Carried(torch.autograd.Function):
    """ContextGroup.carried: from rank to rank, in backward from the last rank to the first."""

    @staticmethod
    def forward(
        ctx: Any,
        context: ContextGroup,
        initial: Tensor,
        added: Tensor,
        keep_b: Tensor | None,
        transition: Tensor | None,
    ) -> Tensor:
        before = context.from_rank_before(initial if context.rank == 0 else added)
        old = _where(keep_b, before)
        context.to_rank_after((old if transition is None else transition @ old) + added)
        ctx.save_for_backward(keep_b, transition, None if transition is None else old)
        ctx.context = context
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_before: Tensor) -> tuple[Tensor | None, ...]:
        context, (keep_b, transition, old) = ctx.context, ctx.saved_tensors
        rank = context.rank
        grad_added = torch.zeros_like(grad_before, memory_format=torch.contiguous_format)
        if rank < context.last:
            context.exchange([], [(grad_added, rank + 1)])
        grad = grad_before + _where(keep_b, grad_added if transition is None else transition.mT @ grad_added)
        if rank:
            context.exchange([(grad.contiguous(), rank - 1)], [])
        grad_transition = None if transition is None else grad_added @ old.mT
        return None, None if rank else grad, grad_added, None, grad_transition


class _Shifted(torch.autograd.Function):
    """ContextGroup.shifted: all ranks send at once, in backward to the rank before."""

    @staticmethod
    def forward(ctx: Any, context: ContextGroup, initial: Tensor, own: Tensor) -> Tensor:
        ctx.context, rank = context, context.rank
        before = torch.empty_like(own, memory_format=torch.contiguous_format) if rank else initial
        sends = [(own.contiguous(), rank + 1)] if rank < context.last else []
        context.exchange(sends, [(before, rank - 1)] if rank else [])
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_before: Tensor) -> tuple[Tensor | None, ...]:
        context, rank = ctx.context, ctx.context.rank
        grad_own = torch.zeros_like(grad_before, memory_format=torch.contiguous_format)
        sends = [(grad_before.contiguous(), rank - 1)] if rank else []
        context.exchange(sends, [(grad_own, rank + 1)] if rank < context.last else [])
        return None, None if rank else grad_before, grad_own


class _Mean(torch.autograd.Function):
    """ContextGroup.mean. Every rank's result depends on every rank's x, so the gradient is the mean, too."""

    @staticmethod
    def forward(ctx: Any, context: ContextGroup, x: Tensor) -> Tensor:
        ctx.context = context
        return _mean(context, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, _mean(ctx.context, grad)


def _mean(context: ContextGroup, x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    context.sum_(total)
    return total / (context.last + 1)


def _where(keep_b: Tensor | None, x: Tensor) -> Tensor:
    """x [b, ...] where keep_b is true, and 0 elsewhere."""
    return x if keep_b is None else torch.where(keep_b.view(-1, *[1] * (x.dim() - 1)), x, 0)
