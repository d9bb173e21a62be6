"""The cache of generation, of constant size: per layer the memory, and keys and values of the current segment only.

A row's segments are counted in its own tokens, so the rows of a batch may be at different positions of their
segments. Padding may be anywhere; it is dropped before keys and values reach a segment or the memory.

In the usual call of generation, a single token for rows at equal positions, tokens are appended in place, and local
attention finds the keys of earlier tokens as it needs them, with RoPE.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration import InfiniConfig
from .window import Placement, Window


class Tokens:
    """A tensor of the current segment's tokens, [..., F, X], with room for more of them.

    Args:
        tokens: [..., F, X]; it is never changed.
    """

    def __init__(self, tokens: Tensor):
        self._room, self._length, self._owned = tokens, tokens.shape[-2], False

    def all(self, first: int = 0) -> Tensor:
        """All tokens from position `first` on."""
        return self._room.narrow(-2, first, self._length - first)

    def write(self, token: Tensor, at: int, limit: int) -> None:
        """Make a token [..., 1, X] the last one, at position `at`, in place.

        Without room for it, all are first copied to twice as much room, but to no more than `limit` tokens.
        """
        room = self._room
        frozen = room.is_inference() and not torch.is_inference_mode_enabled()
        if not self._owned or at == room.shape[-2] or room.dtype != token.dtype or frozen:
            shape = *room.shape[:-2], min(max(2 * at, 64), limit), room.shape[-1]
            self._room = room.new_empty(shape, dtype=torch.promote_types(room.dtype, token.dtype))
            self._room.narrow(-2, 0, at).copy_(room.narrow(-2, 0, at))
            self._owned = True
        self._room.narrow(-2, at, 1).copy_(token)
        self._length = at + 1

    def select(self, rows: Tensor, less: int) -> None:
        """Keep these rows in this order, without the last `less` tokens."""
        self._room, self._owned = self._room[rows], True
        self._length -= less


class InfiniCacheLayer(CacheLayerMixin):
    """The cache of one layer; the last may be the output memory's, with hidden states and features as keys and token
    ids as values.

    Attributes:
        memory: the state before the current segment; None before the first call.
        local: keys and values that local attention of the next token takes, each [B, kv heads, near + F, d], the keys
            with RoPE. None after a call that wants gradients or writes to the memory, and where rows are at different
            positions of their segments.
        prepared: what the memory rule has made of the memory and its parameters for the tokens that are appended to
            the current segment (`MemoryRule.append`); None until the first of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[str, Tensor] | None = None
        self.local: tuple[Tokens, Tokens] | None = None
        self.prepared: dict[str, Tensor] | None = None

    @property
    def keys(self) -> Tensor | None:
        """Of the tokens of the current segment, [B, F, kv heads * d + features]: keys without RoPE, as the memory
        needs them, concatenated with the rule's token features (`MemoryRule.token_features`)."""
        return None if self._keys is None else self._keys.all()

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = None if keys is None else Tokens(keys)

    @property
    def values(self) -> Tensor | None:
        """Of the tokens of the current segment, [B, F, kv heads * d]."""
        if self.local is None or self.keys is None:
            return self._values
        values = self.local[1].all()
        return values[..., values.shape[-2] - self.keys.shape[1] :, :].transpose(1, 2).flatten(2)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = values

    def store(
        self, keys: Tensor, values: Tensor, local: tuple[Tensor, Tensor] | None, memory: dict[str, Tensor]
    ) -> None:
        """Replace what is cached."""
        self.keys, self.memory, self.prepared = keys, memory, None
        self.local = None if local is None else (Tokens(local[0]), Tokens(local[1]))
        self.values = values if local is None else None
        self.is_initialized = True

    def append_key(self, key: Tensor, place: Placement) -> Tokens:
        """Append a token's key and features [B, 1, any]; return all tokens."""
        assert self._keys is not None
        self._keys.write(key, place.cached, place.size)
        return self._keys

    def append_local(self, key: Tensor, value: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Append what local attention takes of a token, each [B, kv heads, 1, d]; return that of all tokens that it
        sees."""
        assert self.local is not None and window.placement is not None
        at, limit = (window.near + count for count in (window.placement.cached, window.placement.size))
        keys, values = self.local
        keys.write(key, at, limit)
        values.write(value, at, limit)
        return keys.all(window.first), values.all(window.first)

    def select(self, rows: Tensor, longest: int) -> None:
        """Keep these rows in this order, and the first `longest` tokens of each; a row may appear several times."""
        if self.memory is None:
            return
        assert self._keys is not None and self.keys is not None
        self.prepared = None
        rows = rows.to(self.keys.device)
        less = self.keys.shape[1] - longest
        for tokens in (self._keys, *(self.local or ())):
            tokens.select(rows, less)
        if self._values is not None:
            self._values = self._values[rows, :longest]
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
        sizes: see `sizes_of`.
    """

    layers: list[InfiniCacheLayer]  # type: ignore[assignment]

    def __init__(self, config: InfiniConfig):
        self._decoder_layers, self._near = config.num_hidden_layers, config.near_length
        self.sizes = self.sizes_of(config)
        super().__init__(layers=[InfiniCacheLayer() for _ in self.sizes])
        self.filled_B: Tensor | None = None
        self._segments_B: Tensor | None = None  # complete segments of each row
        self._columns = 0

    @staticmethod
    def sizes_of(config: InfiniConfig) -> list[int]:
        """Numbers of tokens after which a cache is written: of the decoder layers, and then of the output memory."""
        output = [] if config.output_memory_dim is None else [config.output_chunk]
        return [config.segment_length] * config.num_hidden_layers + output

    def memory(self) -> list[dict[str, Tensor]] | None:
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
        return self._segments_B * self.sizes[0] + self.filled_B

    @property
    def before(self) -> int | None:
        """Number of tokens of the segment before that local attention may see; None where rows differ in it."""
        if not self._near or self._segments_B is None:
            return 0
        begun = [count > 0 for count in self._segments_B.tolist()]
        return self._near if all(begun) else None if any(begun) else 0

    @property
    def ready(self) -> bool:
        """Whether each layer of the decoder holds what the next token attends to."""
        return all(layer.local is not None for layer in self.layers[: self._decoder_layers])

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
        for layer, size in zip(self.layers, self.sizes, strict=True):
            # Frames are as long as the fullest row, which may be gone.
            layer.select(beam_idx, int((self.filled_B % size).max()))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.filled_B is not None:
            self.reorder_cache(torch.arange(len(self.filled_B)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("an Infini cache cannot forget tokens: they may be in the memory already")


def check_cache(cache: object, config: InfiniConfig, rows: int) -> None:
    """Raise ValueError unless this is a cache of such a model for so many rows."""
    if not isinstance(cache, InfiniCache):
        raise ValueError(f"past_key_values: found {type(cache).__name__}, expected InfiniCache")
    if cache.sizes != (sizes := InfiniCache.sizes_of(config)):
        raise ValueError(
            f"past_key_values: found a cache whose layers are written after {cache.sizes} tokens, as of another "
            f"model, expected {sizes}"
        )
    if cache.filled_B is not None and len(cache.filled_B) != rows:
        raise ValueError(f"past_key_values: found a cache of {len(cache.filled_B)} rows, expected {rows}")
