"""The geometry of one call: which tokens form segments, which attend to which, and which memory each may read.

Everything here is computed once per forward pass, from the lengths, the document starts, the padding mask and the
cache, and is the same for every layer.

Shape suffixes: b batch, n segments, s positions in a segment; in rows that are not cut yet B rows, T new tokens,
L tokens of a frame (cached and new), X any width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .context import ContextGroup


@dataclass(frozen=True)
class Access:
    """Which tokens may read the memory, which are written to it, and which memories are kept.

    Documents follow one another in a row without padding, and the memory always describes a single document: the last
    one of the segment before.

    Attributes (all bool; b and s may be 1 where rows or positions are alike):
        read_bns: the token belongs to the document that the memory before its segment describes.
        write_bns: the token belongs to the last document of its segment, whose memory is carried on.
        keep_bn: that last document was running before the segment already, so its memory is added to, not dropped.
    """

    read_bns: Tensor
    write_bns: Tensor
    keep_bn: Tensor

    @classmethod
    def of_documents(cls, documents_bns: Tensor) -> "Access":
        """From the number of each token's document; 0 is the document that the carried memory describes."""
        last_bn = documents_bns[:, :, -1]
        before_bn = F.pad(last_bn[:, :-1], (1, 0))
        return cls(
            read_bns=documents_bns == before_bn[..., None],
            write_bns=documents_bns == last_bn[..., None],
            keep_bn=last_bn == before_bn,
        )

    @classmethod
    def whole_segments(cls, whole_b: Tensor, segments: int) -> "Access":
        """For one document a row, of which only the first whole_b segments are complete and written."""
        yes = torch.ones(1, segments, 1, dtype=torch.bool, device=whole_b.device)
        write = torch.arange(segments, device=whole_b.device) < whole_b[:, None]
        return cls(read_bns=yes, write_bns=write[..., None], keep_bn=yes[..., 0])


class Placement:
    """The layout of a call with cached tokens or padding: where each row's tokens lie relative to its segments.

    Each row gets a frame that begins at a segment boundary and holds the row's cached tokens, then its new ones,
    without the padding. Where all rows are alike a frame is a concatenation; otherwise tokens are gathered into it.

    Args:
        filled_B: number of cached tokens of each row, int64 on the host.
        mask_BT: bool, false for padding; None without padding.
        length: T, columns of the call.
        segment_length: S.

    Attributes:
        frame: L, length of the longest frame.
        segments: n, number of segments that it touches.
        within: no frame reaches beyond its first segment. Queries then need no frame, and a single new token costs
            the work of one token.
        position_BT: each token's position in its frame ([1, T] where rows are alike); 0 for padding.
        whole_B: number of segments that each row completes.
        filled_after_B: number of tokens that stay in the cache of each row.
        first_B: position in the frame of the first token that stays in the cache.
        kept: the largest of filled_after_B.
        alike: all rows have the same layout.
    """

    def __init__(self, filled_B: Tensor, mask_BT: Tensor | None, length: int, segment_length: int):
        size = segment_length
        counts_B = length if mask_BT is None else mask_BT.sum(1).cpu()
        ends_B = filled_B + counts_B
        self.cached, self.length = int(filled_B.max()), length
        self.frame = max(int(ends_B.max()), 1)
        self.segments = -(-self.frame // size)
        self.within = self.frame <= size
        self.whole_B, self.filled_after_B = ends_B // size, ends_B % size
        self.kept = int(self.filled_after_B.max())
        self.first_B = self.whole_B * size
        self.complete = bool((self.whole_B == self.segments).all())
        self.alike = mask_BT is None and bool((filled_B == filled_B[0]).all())
        if self.alike:
            self.position_BT = torch.arange(self.cached, self.cached + length)[None]
            return
        mask = torch.ones(len(filled_B), length, dtype=torch.bool) if mask_BT is None else mask_BT
        filled_B1 = filled_B.to(mask.device)[:, None]
        self.position_BT = (filled_B1 + mask.cumsum(1) - 1).clamp_min(0)
        # source_BL[:, l] is the index, in cached and new tokens side by side, of the token at position l of a frame.
        tokens_BT = mask.int().argsort(dim=1, descending=True, stable=True)  # columns with tokens, then with padding
        place_BL = torch.arange(self.frame, device=mask.device).expand(len(mask), -1)
        new_BL = tokens_BT.gather(1, (place_BL - filled_B1).clamp(0, length - 1))
        self.source_BL = torch.where(place_BL < filled_B1, place_BL, self.cached + new_BL)

    def to(self, device: torch.device) -> "Placement":
        self.position_BT = self.position_BT.to(device, non_blocking=True)
        if not self.alike:
            self.source_BL = self.source_BL.to(device, non_blocking=True)
        return self

    def join(self, cached: Tensor | None, new_BTX: Tensor) -> Tensor:
        """Frames [B, L, X] of cached tokens [B, F, X] and new ones; positions behind a row's end are undefined."""
        x = new_BTX if cached is None else torch.cat((cached, new_BTX), dim=1)
        return x if self.alike else x.take_along_dim(self.source_BL[..., None], dim=1)

    def enframe(self, new_BTX: Tensor) -> Tensor:
        """Scatter new tokens into padded frames; the positions of cached tokens are undefined."""
        if self.alike:
            return F.pad(new_BTX, (0, 0, self.cached, 0))
        return new_BTX.take_along_dim((self.source_BL - self.cached).clamp_min(0)[..., None], dim=1)

    def pick(self, frames_BLX: Tensor) -> Tensor:
        """The inverse of `enframe`: new tokens [B, T, X] out of their frames; undefined for padding."""
        if self.alike:
            return frames_BLX[:, self.cached : self.cached + self.length]
        return frames_BLX.take_along_dim(self.position_BT[..., None], dim=1)

    def rest(self, frames_BLX: Tensor) -> Tensor:
        """What stays in the cache, [B, kept, X]: the tokens of each row behind its last complete segment."""
        if self.alike:
            first = int(self.first_B[0])
            # A copy, because a view would keep the keys of the whole prompt alive.
            return frames_BLX[:, first : first + self.kept].clone() if first else frames_BLX[:, : self.kept]
        places = (self.first_B[:, None] + torch.arange(self.kept)).clamp_max(self.frame - 1)
        return frames_BLX.take_along_dim(places[..., None].to(frames_BLX.device), dim=1)

    def access(self, device: torch.device) -> Access | None:
        """All tokens read, and complete segments are written. None if every segment is complete."""
        return None if self.complete else Access.whole_segments(self.whole_B.to(device), self.segments)

    def local_mask(self) -> Tensor | None:
        """The local attention mask of a call that stays within one segment, bool [B or 1, 1, T, L]; None: causal."""
        if self.alike and not self.cached:
            return None
        places = torch.arange(self.frame, device=self.position_BT.device)
        return (places <= self.position_BT[..., None])[:, None]


@dataclass(frozen=True)
class Window:
    """What every layer needs to know of a call; computed once per forward pass, on the host where possible.

    Attributes:
        segments: n. The last one is filled up with padding where the length is no multiple of S.
        padding: number of tokens of that filling, all behind the last real token.
        access: None where the whole window continues the carried document and all of it is written.
        local_mask: bool [r, 1, queries, keys], r may be 1; None for plain causal attention in every segment.
        rope_q, rope_k: cosines and sines by position in the segment, each [b or 1, 1, positions, d]. Attention
            depends on differences of positions within a segment only, so all segments share them.
        read: false lets every token find its memory empty, to measure what the memory is worth.
        placement: the layout of a call with cached tokens or padding; None for dense batches.
        masked_R: int64 [r], the segments (of b*n) that local_mask is for; the others are plain causal. None: all.
        reach_BT: number of earlier tokens of the same document, counted up to 3 (of the same segment, if `read` is
            false); None where no document starts.
        context: the ranks that share the window, of which this one has consecutive segments; None: it has them all.
    """

    segments: int
    rope_q: tuple[Tensor, Tensor]
    rope_k: tuple[Tensor, Tensor]
    padding: int = 0
    access: Access | None = None
    local_mask: Tensor | None = None
    read: bool = True
    placement: Placement | None = None
    masked_R: Tensor | None = None
    reach_BT: Tensor | None = None
    context: "ContextGroup | None" = None

    def split(self, x_BTD: Tensor, head_dim: int) -> Tensor:
        """[B, T, heads * d] -> [b, n, heads, s, d]. The one copy that makes it contiguous saves many strided
        passes."""
        x = F.pad(x_BTD, (0, 0, 0, self.padding)) if self.padding else x_BTD
        x = x.unflatten(2, (-1, head_dim)).unflatten(1, (self.segments, -1))
        return x.transpose(2, 3).contiguous()

    @staticmethod
    def local_masks(host_bns: Tensor, documents_bns: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`local_mask` and `masked_R` from the number of each token's document, which is given twice: on the host,
        where it decides which segments need a mask at all, and on the device of the masks."""
        inside = (host_bns[:, :, 0] != host_bns[:, :, -1]).flatten()
        if not (count := int(inside.sum())):
            return None, None
        d, rows = documents_bns.flatten(0, 1), None
        # Rounded up to a power of two, because torch.compile compiles again for each new shape.
        if (count := 1 << (count - 1).bit_length()) < len(d):
            rows = inside.int().argsort(descending=True, stable=True)[:count].to(d.device, non_blocking=True)
            d = d.index_select(0, rows)
        return (d[:, :, None] == d[:, None, :]).tril()[:, None], rows
