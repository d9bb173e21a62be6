"""Context parallelism over the memory: a window's segments spread over the ranks of a group (DESIGN, section 7).

Each rank reads consecutive segments as if they were a window of their own; all that it needs of the others is the
memory before its first segment. What the ranks before have done to a memory is one small map each, whatever the
number of their tokens, so one all-gather of these maps tells every rank its own beginning and the end of the window
(as LASP-2 does for linear attention, arXiv 2502.07563). The other way, gradients of the maps are summed over ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, _functional_collectives, get_rank

if hasattr(_functional_collectives, "all_gather_single_autograd"):
    all_gather = _functional_collectives.all_gather_single_autograd
else:  # its name in torch 2.11
    all_gather = _functional_collectives.all_gather_tensor_autograd


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share windows, in the order of their segments."""

    group: ProcessGroup

    def gather(self, *parts: Tensor) -> list[tuple[Tensor, ...]]:
        """Of each rank, these tensors [b, ...]; one all-gather, in float32 or the widest dtype given."""
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
        """A state before this rank's segments and after the window, both [b, ...].

        Args:
            initial: the state before the window, the same on all ranks.
            added, kept: this rank makes of a state `kept @ state + added`, or `state + added` without `kept`.
            keep_b: bool, false where it drops what was there, however large: the result is `added`; None: all kept.
        """
        ones = torch.ones(len(added), 1, dtype=added.dtype, device=added.device)
        flag = ones if keep_b is None else ones * keep_b[:, None]
        states = [initial]
        for keep, add, *maps in self.gather(flag, added, *([] if kept is None else [kept])):
            old = torch.where(keep.view(-1, *[1] * (add.dim() - 1)) > 0, states[-1], 0)
            states.append((maps[0] @ old if maps else old) + add)
        # Not states[rank]: the first rank's would not depend on the others, so that it would stay away from the
        # collective of their backward.
        return torch.stack(states[:-1])[get_rank(self.group)], states[-1]
