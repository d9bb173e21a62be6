"""Makes the layout of a call (window.py) from its lengths, document starts, padding and cache."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration import InfiniConfig
from .window import CAUSAL, CONV_REACH, Access, LocalMask, Placement, Reach, Window

if TYPE_CHECKING:
    from .context import ContextGroup


@dataclass(frozen=True)
class WindowBuilder:
    """Makes the `Window` of a call, which all layers share.

    Attributes:
        config: of the model.
        rotary: cosines and sines of positions, as LlamaRotaryEmbedding gives them.
        reads_memory: false: every token reads an empty memory.
        own_segment: local attention sees its own segment alone, as if there were no `sliding_window`; only without a
            cache. What it carries for later calls is the same.
    """

    config: InfiniConfig
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    reads_memory: bool
    own_segment: bool = False

    def window(
        self,
        x_BTD: Tensor,
        starts: Tensor | None,
        placement: Placement | None,
        near_BP: Tensor | None,
        context: "ContextGroup | None",
        real_BL: Tensor | None,
    ) -> Window:
        """The layout of a call; near_BP: `near` of the state before it; the others as in `Window`."""
        reach = None
        if self.config.sliding_window is not None:
            assert near_BP is not None
            reach = Reach(self.config.sliding_window, self.config.near_length, near_BP)
        if placement is not None:
            return self._placed(x_BTD, placement, reach)
        return self._dense(x_BTD, starts, reach, context, real_BL)

    def _placed(self, x_BTD: Tensor, placement: Placement, reach: Reach | None) -> Window:
        """The layout of a call with a cache: one document a row."""
        place, size, near = placement.to(x_BTD.device), self.config.segment_length, self.config.near_length
        if place.appends:
            assert place.before is not None
            rope = self._rope(x_BTD, near + place.cached, 1)
            rope[1][..., : rope[1].shape[-1] // 2].neg_()
            first = near - place.before
            if self.config.sliding_window is not None:
                first = max(first, near + place.cached + 1 - self.config.sliding_window)
            return Window(1, rope, rope, reads_memory=self.reads_memory, placement=place, near=near, first=first)
        if place.within:
            size = place.frame
        rope_k = self._rope(x_BTD, 0, near + size)
        rope_q = rope_k[0][:, :, near:], rope_k[1][:, :, near:]
        if place.within:
            rope_q = rope_q[0][0, 0, place.position_BT][:, None], rope_q[1][0, 0, place.position_BT][:, None]
            local = place.local_mask(reach)
        elif reach is None:
            local = CAUSAL
        else:
            documents = torch.zeros(len(x_BTD), place.segments, size, dtype=torch.long)
            local = LocalMask.of_documents(documents, documents.to(x_BTD.device), reach)
        return Window(
            place.segments,
            rope_q,
            rope_k,
            padding=place.segments * size - place.frame,
            access=place.access(x_BTD.device),
            local=local,
            reads_memory=self.reads_memory,
            placement=place,
            near=near,
            near_after_BP=None if reach is None else place.near_after(reach),
        )

    def _dense(
        self,
        x_BTD: Tensor,
        starts: Tensor | None,
        reach: Reach | None,
        context: "ContextGroup | None",
        real_BL: Tensor | None,
    ) -> Window:
        """The layout of a call without a cache, in which documents may begin anywhere. Padding is already removed
        (`packing.PackedRows`)."""
        (batch, length), size, near = x_BTD.shape[:2], self.config.segment_length, self.config.near_length
        segments = -(-length // size)
        size = length if segments == 1 else size  # a short text is not padded to a whole segment
        padding = segments * size - length
        if context is not None:
            assert not padding and length >= CONV_REACH, "whole segments"
        if starts is not None and starts.shape != (batch, length):
            raise ValueError(f"starts: found shape {tuple(starts.shape)}, expected {(batch, length)}")

        # Number the documents of each row; 0 is the one that the carried memory describes. `starts` is examined on
        # its own device. Batches keep it on the CPU, so this needs no device sync.
        access, local, documents, conv_reach_BT, after_BP = None, CAUSAL, None, None, None
        begins = starts is not None and bool(starts.any())
        if begins:
            assert starts is not None
            documents = F.pad(starts.long(), (0, padding)).cumsum(1).unflatten(1, (segments, size))
        elif reach is not None:
            documents = torch.zeros(batch, segments, size, dtype=torch.long)
        if documents is not None:
            on_host, documents = documents, documents.to(x_BTD.device, non_blocking=True)
            if reach is not None:
                after_BP = (documents[:, -1, -near:] == documents[:, -1, -1:]).to(reach.before_BP.dtype)
                if context is not None:
                    reach = replace(reach, before_BP=context.shifted(reach.before_BP, after_BP))
            if self.own_segment:
                reach = None
            if begins or reach is not None:
                local = LocalMask.of_documents(on_host, documents, reach, begins)
        if begins:
            assert documents is not None
            access = Access.of_documents(documents)
            before = F.pad(documents.flatten(1), (CONV_REACH, 0))
            conv_reach_BT = torch.stack(
                [before[:, CONV_REACH - j : -j] == before[:, CONV_REACH:] for j in range(1, CONV_REACH + 1)]
            ).sum(0)
        if not self.reads_memory and not near:  # inputs of a convolution in earlier segments count as memory, too
            within = torch.arange(size, device=x_BTD.device).clamp_max(CONV_REACH).repeat(segments).expand(batch, -1)
            conv_reach_BT = within if conv_reach_BT is None else torch.minimum(conv_reach_BT, within)
        rope_k = self._rope(x_BTD, 0, near + size)
        rope_q = rope_k[0][:, :, near:], rope_k[1][:, :, near:]
        return Window(
            segments,
            rope_q,
            rope_q if self.own_segment else rope_k,
            padding,
            access,
            local,
            self.reads_memory,
            conv_reach_BT=conv_reach_BT,
            context=context,
            near=near,
            near_after_BP=after_BP,
            own_segment=self.own_segment,
            real_BL=real_BL,
        )

    def _rope(self, x_BTD: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `count` positions, each [1, 1, count, d]. The first token of a segment has position
        `near`, because that many keys of the segment before come first."""
        cos, sin = self.rotary(x_BTD, torch.arange(first, first + count, device=x_BTD.device)[None])
        return cos[:, None], sin[:, None]
