"""Context parallelism over the memory: the segments of a window spread over the ranks of a group.

Each rank processes consecutive segments as if they were a window of their own. All it needs from the others is the
memory before its first segment. What a rank does to a memory is one small map, whatever the number of its tokens, so
an exclusive scan over ranks by one all-gather of these maps gives every rank the memory before its segments and after
the window (LASP-2 does so for linear attention, arXiv 2502.07563). In backward, the gradients of the maps are summed
over ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, _functional_collectives, get_rank, get_world_size

if hasattr(_functional_collectives, "all_gather_single_autograd"):
    all_gather = _functional_collectives.all_gather_single_autograd
else:  # its name in torch 2.11
    all_gather = _functional_collectives.all_gather_tensor_autograd


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share windows, in the order of their segments."""

    group: ProcessGroup

    def gather(self, *parts: Tensor) -> list[tuple[Tensor, ...]]:
        """These tensors, each [b, ...], of every rank, by one all-gather in the widest of their dtypes."""
        flat = [part.flatten(1) for part in parts]
        gathered = all_gather(torch.cat(flat, dim=1)[None].contiguous(), 0, self.group)
        sizes = [part.shape[1] for part in flat]
        return [
            tuple(x.view_as(part) for x, part in zip(of_rank.split(sizes, dim=1), parts, strict=True))
            for of_rank in gathered.unbind(0)
        ]

    def carried(
        self, initial: Tensor, added: Tensor, keep_b: Tensor | None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """An exclusive scan across ranks.

        Args:
            initial: the state before the window, [b, ...], the same on all ranks.
            added, kept: the segments of this rank turn a state into `kept @ state + added`, or, without `kept`, into
                `state + added`.
            keep_b: bool [b]; where false they turn any state, even an infinite one, into `added`. None: all true.

        Returns:
            the state before this rank's segments, and the state after the window, both [b, ...].
        """
        ones = torch.ones(len(added), 1, dtype=added.dtype, device=added.device)
        flag = ones if keep_b is None else ones * keep_b[:, None]
        states = [initial]
        for keep, add, *maps in self.gather(flag, added, *([] if kept is None else [kept])):
            old = torch.where(keep.view(-1, *[1] * (add.dim() - 1)) > 0, states[-1], 0)
            states.append((maps[0] @ old if maps else old) + add)
        # Stacked and then indexed, so that the first rank's result depends on the gathered tensors as well: otherwise
        # it would not take part in the collective of the backward pass, and the others would wait for it.
        return torch.stack(states[:-1])[get_rank(self.group)], states[-1]

    def from_rank_before(self, initial: Tensor) -> Tensor:
        """What the rank before has sent with `to_rank_after`; `initial` on the first rank. Not differentiable."""
        if (rank := get_rank(self.group)) == 0:
            return initial
        received = torch.empty_like(initial, memory_format=torch.contiguous_format)
        distributed.recv(received, group=self.group, group_src=rank - 1)
        return received

    def to_rank_after(self, state: Tensor) -> Tensor:
        """Send a state to the next rank, and return the state of the last rank. Not differentiable."""
        last = get_world_size(self.group) - 1
        if (rank := get_rank(self.group)) < last:
            distributed.send(state.contiguous(), group=self.group, group_dst=rank + 1)
        state = state.contiguous()
        distributed.broadcast(state, group=self.group, group_src=last)
        return state
