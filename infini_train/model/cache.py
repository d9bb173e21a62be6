"""The cache of generation, of constant size: per layer the memory, and keys and values of the current segment only.

A row's segments are counted in its own tokens, so the rows of a batch may be at different positions of their
segments. Padding may be anywhere; it is dropped before keys and values reach a segment or the memory.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration import InfiniConfig
from .memory_rule import MemoryState
from .window import Placement


class InfiniCacheLayer(CacheLayerMixin):
    """The cache of one layer.

    Attributes:
        memory: the state before the current segment; None before the first call.
        keys: of the tokens of the current segment, [B, F, kv heads * d + features]: keys without RoPE, as the
            memory needs them, concatenated with the rule's token features (`MemoryRule.token_features`).
        values: [B, F, kv heads * d].
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: MemoryState | None = None

    def store(self, keys: Tensor, values: Tensor, memory: MemoryState) -> None:
        self.keys, self.values, self.memory = keys, values, memory
        self.is_initialized = True

    def select(self, rows: Tensor, longest: int) -> None:
        """Keep these rows in this order, and the first `longest` tokens of each; a row may appear several times."""
        if self.memory is not None:
            assert self.keys is not None and self.values is not None
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys[rows, :longest], self.values[rows, :longest]
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
    """What generation carries from call to call. Pass it as `past_key_values`, to a forward call or to `generate`.

    A copy (`copy.deepcopy`) taken after a long common prefix serves many continuations.

    Attributes:
        filled_B: tokens of each row in its current segment, int64, on the CPU; None before the first call.
    """

    layers: list[InfiniCacheLayer]  # type: ignore[assignment]

    def __init__(self, config: InfiniConfig):
        # Tokens after which each layer's cache is written: the decoder layers, and then the output memory.
        self._sizes = [config.segment_length] * config.num_hidden_layers
        if config.output_memory_dim is not None:
            self._sizes.append(config.output_chunk)
        super().__init__(layers=[InfiniCacheLayer() for _ in self._sizes])
        self.filled_B: Tensor | None = None
        self._segments_B: Tensor | None = None  # complete segments of each row
        self._columns = 0

    def memory(self) -> list[MemoryState] | None:
        """The states before the current segments, one per layer, and that of the output memory before the current
        chunk; None before the first call."""
        states = [layer.memory for layer in self.layers if layer.memory is not None]
        return states or None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns of `input_ids` seen so far, padding included, which is how `generate` counts."""
        return self._columns

    def tokens(self) -> Tensor | None:
        """Number of tokens of each row so far, without padding, int64 [B] on the CPU; None before the first call."""
        if self.filled_B is None or self._segments_B is None:
            return None
        return self._segments_B * self._sizes[0] + self.filled_B

    def advance(self, placement: Placement, columns: int) -> None:
        """Count the tokens of a call, once all layers have stored theirs."""
        self.filled_B = placement.filled_after_B
        self._segments_B = placement.whole_B + (0 if self._segments_B is None else self._segments_B)
        self._columns += columns

    def reset(self) -> None:
        self.layers = [InfiniCacheLayer() for _ in self.layers]
        self.filled_B = self._segments_B = None
        self._columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.filled_B is None:
            return
        rows = beam_idx.cpu()
        assert self._segments_B is not None
        self.filled_B, self._segments_B = self.filled_B[rows], self._segments_B[rows]
        for layer, size in zip(self.layers, self._sizes, strict=True):
            # Frames are as long as the fullest row, which may be gone.
            layer.select(beam_idx, int((self.filled_B % size).max()))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.filled_B is not None:
            self.reorder_cache(torch.arange(len(self.filled_B)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("an Infini cache cannot forget tokens: they may be in the memory already")
