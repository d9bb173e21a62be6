"""A cache of constant size for generation: per layer the memory, and keys and values of the current segment only.

Segments are counted in tokens of their row, so rows of a batch may stand at different places of their segments, and
padding, wherever it stands, is no token: it is dropped before keys and values reach a segment or the memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration import InfiniConfig
from .memory import Access, MemoryState


class InfiniCacheLayer(CacheLayerMixin):
    """One layer's share: `memory` before the current segment (None: nothing seen yet); `keys` (without RoPE, as the
    memory wants them) and `values` [B, F, kv heads * d] of the tokens of the current segment."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: MemoryState | None = None

    def store(self, keys: Tensor, values: Tensor, memory: MemoryState) -> None:
        self.keys, self.values, self.memory = keys, values, memory
        self.is_initialized = True

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        if self.memory is not None:
            assert self.keys is not None and self.values is not None
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys[rows], self.values[rows]
            self.memory = {name: value[rows] for name, value in self.memory.items()}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("InfiniAttention writes to its cache by `store`")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("InfiniAttention writes to its cache by `store`")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("Infini-attention makes its own masks")

    def get_seq_length(self) -> int:
        raise NotImplementedError("rows differ in their number of tokens; InfiniCache.get_seq_length counts columns")

    def get_max_length(self) -> int:
        return -1


class InfiniCache(Cache):
    """What generation carries from call to call. Pass it as `past_key_values`, alone or to `generate`.

    A copy (`copy.deepcopy`) after a long common prefix serves many continuations.

    Attributes:
        filled_B: tokens of each row in its current segment, int64 on the host; None before the first call.
    """

    layers: list[InfiniCacheLayer]  # type: ignore[assignment]

    def __init__(self, config: InfiniConfig):
        super().__init__(layers=[InfiniCacheLayer() for _ in range(config.num_hidden_layers)])
        self.filled_B: Tensor | None = None
        self._columns = 0

    def memory(self) -> list[MemoryState] | None:
        """The memories before the current segments, one state per layer; None before the first call."""
        states = [layer.memory for layer in self.layers if layer.memory is not None]
        return states or None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` seen so far, padding included, as `generate` counts."""
        return self._columns

    def advance(self, placement: "Placement", columns: int) -> None:
        """Count a call's tokens, after all layers have stored theirs."""
        self.filled_B = placement.filled_after_B
        self._columns += columns

    def reset(self) -> None:
        self.layers = [InfiniCacheLayer() for _ in self.layers]
        self.filled_B, self._columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.select(beam_idx)
        if self.filled_B is not None:
            self.filled_B = self.filled_B[beam_idx.cpu()]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.filled_B is not None:
            self.reorder_cache(torch.arange(len(self.filled_B)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("an Infini cache cannot forget tokens: they may be in the memory already")


class Placement:
    """Where the T columns of a call stand in their rows' segments, behind what the cache holds.

    A row's frame is its cached tokens, then its new ones, padding left out; frames begin at segment boundaries.
    Where all rows are alike the frame is a concatenation; otherwise tokens are gathered into it.

    Args:
        filled_B: cached tokens of each row, int64 on the host.
        mask_BT: bool, false for padding; None where there is none.
        length: T.
        segment_length: S.

    Attributes:
        frame: L, length of the longest frame.
        segments: n, segments that it touches.
        within: no frame leaves its first segment, so that queries need no frame of their own: one new token costs
            the work of one token.
        position_BT: each token's place in its frame ([1, T] where rows are alike); 0 for padding.
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
        self.first_B = self.whole_B * size  # place of the first token that stays in the cache
        self.complete = bool((self.whole_B == self.segments).all())
        self.alike = mask_BT is None and bool((filled_B == filled_B[0]).all())
        if self.alike:
            self.position_BT = torch.arange(self.cached, self.cached + length)[None]
            return
        mask = torch.ones(len(filled_B), length, dtype=torch.bool) if mask_BT is None else mask_BT
        filled_B1 = filled_B.to(mask.device)[:, None]
        self.position_BT = (filled_B1 + mask.cumsum(1) - 1).clamp_min(0)
        tokens_BT = mask.int().argsort(dim=1, descending=True, stable=True)  # columns of tokens, then of padding
        place_BL = torch.arange(self.frame, device=mask.device).expand(len(mask), -1)
        new_BL = tokens_BT.gather(1, (place_BL - filled_B1).clamp(0, length - 1))
        self.source_BL = torch.where(place_BL < filled_B1, place_BL, self.cached + new_BL)

    def to(self, device: torch.device) -> "Placement":
        self.position_BT = self.position_BT.to(device, non_blocking=True)
        if not self.alike:
            self.source_BL = self.source_BL.to(device, non_blocking=True)
        return self

    def join(self, cached: Tensor | None, new_BTX: Tensor) -> Tensor:
        """Frames [B, L, X] of cached [B, F, X] and new tokens; what lies behind a row's end is arbitrary."""
        x = new_BTX if cached is None else torch.cat((cached, new_BTX), dim=1)
        return x if self.alike else x.take_along_dim(self.source_BL[..., None], dim=1)

    def enframe(self, new_BTX: Tensor) -> Tensor:
        """Frames of new tokens alone; what stands at the places of cached tokens is arbitrary."""
        if self.alike:
            return F.pad(new_BTX, (0, 0, self.cached, 0))
        return new_BTX.take_along_dim((self.source_BL - self.cached).clamp_min(0)[..., None], dim=1)

    def pick(self, frames_BLX: Tensor) -> Tensor:
        """The new tokens, [B, T, X], out of their frames; arbitrary for padding."""
        if self.alike:
            return frames_BLX[:, self.cached : self.cached + self.length]
        return frames_BLX.take_along_dim(self.position_BT[..., None], dim=1)

    def rest(self, frames_BLX: Tensor) -> Tensor:
        """What stays in the cache, [B, kept, X]: the tokens behind the last whole segment of each row."""
        if self.alike:
            first = int(self.first_B[0])
            # A copy: a view would keep the whole prompt's keys alive.
            return frames_BLX[:, first : first + self.kept].clone() if first else frames_BLX[:, : self.kept]
        places = (self.first_B[:, None] + torch.arange(self.kept)).clamp_max(self.frame - 1)
        return frames_BLX.take_along_dim(places[..., None].to(frames_BLX.device), dim=1)

    def access(self, device: torch.device) -> Access | None:
        """Every token reads, whole segments are written. None where all are whole."""
        return None if self.complete else Access.whole_segments(self.whole_B.to(device), self.segments)

    def local_mask(self) -> Tensor | None:
        """What a query within the first segment attends to, [B or 1, 1, T, L] bool; None: plain causal."""
        if self.alike and not self.cached:
            return None
        places = torch.arange(self.frame, device=self.position_BT.device)
        return (places <= self.position_BT[..., None])[:, None]
