"""The layout of one call: which tokens form segments, which attend to which, and which memory each may read.

Everything here is computed once per forward pass, from the lengths, the document starts, the padding mask and the
cache, and is the same for every layer.

Shape suffixes: b batch, n segments, s positions in a segment; in rows that are not cut yet B rows, T new tokens,
L tokens of a frame (cached and new), X any width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .context import ContextGroup

CONV_REACH = 3  # number of tokens before it that a convolution over tokens takes: its width less one


@dataclass(frozen=True)
class Access:
    """Which tokens may read the memory, which are written to it, and where the old memory is kept rather than
    dropped.

    Documents follow one another in a row without padding, and the memory always describes a single document: the last
    one of the segment before.

    Attributes (all bool; b and s may be 1 where rows or positions are alike):
        read_bns: the token belongs to the document that the memory before its segment describes.
        write_bns: the token belongs to the last document of its segment, whose memory is carried on.
        keep_bn: that document began before this segment, so the old memory is kept.
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
    """The layout of a call with a cache, whose rows may also hold padding: where each row's tokens lie relative to
    its segments. (Padding without a cache is removed by `packing.PackedRows`.)

    Each row gets a frame that begins at a segment boundary and holds the row's cached tokens, then its new ones,
    without the padding. Where all rows are alike a frame is a concatenation; otherwise tokens are gathered into it.

    Args:
        filled_B: number of cached tokens of each row, int64, on the CPU.
        mask_BT: bool, false for padding; None without padding.
        length: T, columns of the call.
        segment_length: S.
        before: tokens of the segment before that each row sees, if the next token can be appended in place: the cache
            holds what local attention takes of the tokens before it, and no gradient is wanted. None: it cannot.

    Attributes:
        before: as given.
        size: S.
        frame: L, length of the longest frame.
        segments: n, number of segments that it touches.
        within: every frame fits into one segment. Queries then need no frame.
        writes: some row completes a segment, which is written to the memory.
        appends: a single token is appended to each row in place (`cache.Tokens`): the usual call of generation, which
            costs the work of one token.
        position_BT: each token's position in its frame ([1, T] where rows are alike); 0 for padding.
        ends_B: number of tokens in each row's frame.
        whole_B: number of segments that each row completes.
        filled_after_B: number of tokens that stay in the cache of each row.
        first_B: position in the frame of the first token that stays in the cache.
        kept: the largest of filled_after_B.
        alike: all rows have the same layout.
        appendable: the next call may append in this way.
    """

    def __init__(
        self,
        filled_B: Tensor,
        mask_BT: Tensor | None,
        length: int,
        segment_length: int,
        before: int | None = None,
    ):
        self.size, self.before = (size := segment_length), before
        counts_B = length if mask_BT is None else mask_BT.sum(1).cpu()
        ends_B = filled_B + counts_B
        # On numbers, because a new token takes longer for small tensors than for its arithmetic.
        filled, ends = filled_B.tolist(), ends_B.tolist()
        self.cached, self.length = max(filled), length
        self.frame = max(*ends, 1)
        self.segments = -(-self.frame // size)
        self.within = self.frame <= size
        self.ends_B, self.whole_B, self.filled_after_B = ends_B, ends_B // size, ends_B % size
        self.writes = self.frame >= size
        self.kept = max(end % size for end in ends)
        self.first_B = self.whole_B * size
        self.complete = all(end // size == self.segments for end in ends)
        self.alike = mask_BT is None and len(set(filled)) == 1
        self.appends = before is not None and self.alike and length == 1 and not self.writes
        self.appendable = self.alike and self.within and not self.writes and not torch.is_grad_enabled()
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
        """Frames [B, L, X] of cached tokens [B, F, X] and new ones; positions after a row's last token are
        undefined."""
        x = new_BTX if cached is None else torch.cat((cached, new_BTX), dim=1)
        return x if self.alike else x.take_along_dim(self.source_BL[..., None], dim=1)

    def enframe(self, new_BTX: Tensor) -> Tensor:
        """Lay out new tokens [B, T, X] in frames [B, L, X]; the positions of cached tokens are undefined."""
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
        """All tokens read, and complete segments are written. None if all segments of all rows are complete, or none
        is."""
        return (
            None
            if self.complete or not self.writes
            else Access.whole_segments(self.whole_B.to(device), self.segments)
        )

    def local_mask(self, reach: "Reach | None") -> "LocalMask":
        """The mask of a call that stays within one segment; queries are the T columns, keys the frame, behind the
        tokens of the segment before."""
        if reach is None:
            if self.alike and (not self.cached or self.length == 1):
                return LocalMask()
            places = torch.arange(self.frame, device=self.position_BT.device)
            return LocalMask(own=(places <= self.position_BT[..., None])[:, None])
        places = torch.arange(-reach.near, self.frame, device=self.position_BT.device)
        distance_BTL = self.position_BT[..., None] - places
        seen_BL = F.pad(reach.before_BP > 0, (0, self.frame), value=True)
        return LocalMask(own=((distance_BTL >= 0) & (distance_BTL < reach.width) & seen_BL[:, None])[:, None])

    def near_after(self, reach: "Reach") -> Tensor:
        """`Reach.before_BP` of the next call: all tokens of a complete segment belong to its row's document."""
        return torch.where((self.whole_B > 0).to(reach.before_BP.device)[:, None], 1.0, reach.before_BP)


@dataclass(frozen=True)
class Reach:
    """How far local attention reaches beyond the start of a segment.

    Attributes:
        width: number of tokens that a token attends to, itself included (`sliding_window`).
        near: P, number of tokens of the segment before that a segment's keys begin with.
        before_BP: which of the last P tokens before the call belong to the document in progress, 1 or 0.
    """

    width: int
    near: int
    before_BP: Tensor


class LocalMask(NamedTuple):
    """Which keys each query attends to, by segment; all masks are bool [.., 1, queries, keys].

    shared: [1, ...], of all segments but those in `rows`; None: plain causal, and a single query attends to all keys.
    own: [r, ...], of the segments in `rows`; r may be 1 where all are alike.
    rows: int64 [r], numbers of segments, of b*n; None with `own`: all.
    """

    shared: Tensor | None = None
    own: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    def of_documents(
        cls, host_bns: Tensor, documents_bns: Tensor, reach: Reach | None, begins: bool = True
    ) -> "LocalMask":
        """For documents that begin anywhere in the window.

        Args:
            host_bns, documents_bns: number of each token's document, on the host, where it decides which segments
                need a mask of their own, and on the device of the masks. 0 is the document of the tokens before the
                call.
            reach: how far attention reaches beyond the start of a segment; None: not at all.
            begins: false if no document begins in the window. No value is read then, so fake tensors will do.
        """
        first_bn, last_bn = host_bns[:, :, 0], host_bns[:, :, -1]
        device, size = documents_bns.device, documents_bns.shape[-1]
        near = 0 if reach is None else reach.near
        distance = torch.arange(size, device=device)[:, None] - torch.arange(-near, size, device=device)
        visible, keys_bnl, shared = distance >= 0, documents_bns, None
        if reach is not None:
            visible &= distance < reach.width
            shared = visible[None, None]
            # A segment's keys begin with the end of the segment before, of which other documents are not seen.
            before_bnp = torch.where(reach.before_BP > 0, 0, -1)[:, None]
            if documents_bns.shape[1] > 1:
                before_bnp = torch.cat((before_bnp, documents_bns[:, :-1, -near:]), dim=1)
            keys_bnl = torch.cat((before_bnp, documents_bns), dim=-1)
            # Which tokens before the call are seen is known on the device only: the first segment gets its own mask.
            first_bn = F.pad(host_bns[:, :-1, -near:][..., 0], (1, 0), value=-1)
        special = (first_bn != last_bn).flatten()
        if not (count := int(special.sum()) if begins else len(host_bns)):
            return cls(shared)
        d, keys, rows = documents_bns.flatten(0, 1), keys_bnl.flatten(0, 1), None
        # Rounded up to a power of two, because torch.compile compiles again for each new shape.
        if (count := 1 << (count - 1).bit_length()) < d.shape[0]:  # len(d) would be a constant of torch.export
            rows = special.int().argsort(descending=True, stable=True)[:count].to(device, non_blocking=True)
            d, keys = d.index_select(0, rows), keys.index_select(0, rows)
        return cls(shared, ((d[:, :, None] == keys[:, None, :]) & visible)[:, None], rows)


CAUSAL = LocalMask()


@dataclass(frozen=True)
class Window:
    """What every layer needs to know of a call; computed once per forward pass, on the host where possible.

    Attributes:
        segments: n. The last one is filled up with padding where the length is no multiple of S.
        padding: number of padding tokens after the last real one.
        access: None where no token needs a mask: all of the window continues the carried document, and all of it is
            written or, in generation, no segment is complete and nothing is.
        local: which keys each query attends to within its segment, or from `near` tokens before its segment on.
        rope_q, rope_k: cosines and sines by position in the segment, each [b or 1, 1, positions, d]. Attention
            depends on differences of positions within a segment only, so all segments share them. With
            `placement.appends`, both are for `fused.rotate_token`, which wants the first half of the sines negated.
        reads_memory: false: every token reads an empty memory, as in evaluation with the memory off.
        placement: the layout of a call with a cache; None without one.
        conv_reach_BT: for the rules that convolve tokens, how many of the CONV_REACH tokens before each token belong
            to its document (and to its segment, if `reads_memory` is false); None: all of them everywhere.
        near: number of tokens of the segment before that local attention sees; 0: none.
        first: with `placement.appends`, number of the first cached token that local attention sees.
        near_after_BP: which of the last `near` tokens of the call belong to the document in progress, 1 or 0.
        own_segment: local attention sees its own segment alone in this call, whatever `near` is carried.
        context: the ranks that share the window, of which this one has consecutive segments; None: it has them all.
        real_BL: bool, the tokens that are not padding, in a call without a cache that holds some; None: all.
    """

    segments: int
    rope_q: tuple[Tensor, Tensor]
    rope_k: tuple[Tensor, Tensor]
    padding: int = 0
    access: Access | None = None
    local: LocalMask = CAUSAL
    reads_memory: bool = True
    placement: Placement | None = None
    conv_reach_BT: Tensor | None = None
    near: int = 0
    first: int = 0
    near_after_BP: Tensor | None = None
    own_segment: bool = False
    context: "ContextGroup | None" = None
    real_BL: Tensor | None = None

    def split(self, x_BTD: Tensor, head_dim: int) -> Tensor:
        """[B, T, heads * d] -> [b, n, heads, s, d]. The one copy that makes it contiguous saves many strided
        passes."""
        x = F.pad(x_BTD, (0, 0, 0, self.padding)) if self.padding else x_BTD
        (batch, length, width), n = x.shape, self.segments
        if length == n:
            return x.view(batch, n, width // head_dim, 1, head_dim)
        return x.view(batch, n, length // n, width // head_dim, head_dim).transpose(2, 3).contiguous()

    def tokens_bns(self, size: int, device: torch.device) -> Tensor | None:
        """Which positions of the window's segments of `size` positions hold a token, bool [b or 1, n, s]; None:
        all."""
        if self.real_BL is not None:
            padded = F.pad(self.real_BL, (0, self.segments * size - self.real_BL.shape[1]))
            return padded.unflatten(1, (self.segments, size))
        if self.placement is not None:
            ends_b = self.placement.ends_B.to(device)
        elif self.padding:
            ends_b = torch.tensor([self.segments * size - self.padding], device=device)
        else:
            return None
        places = torch.arange(self.segments * size, device=device)
        return (places < ends_b[:, None]).unflatten(1, (self.segments, size))
