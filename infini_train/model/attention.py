"""Infini-attention of one layer: causal attention within the segment, memory for all before it, a gate per head."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import InfiniCacheLayer, Placement
from .configuration import InfiniConfig
from .fused import rotate
from .memory import Access, MemoryState
from .rules import RULES

if TYPE_CHECKING:
    from .context import ContextGroup


@dataclass(frozen=True)
class Window:
    """What every layer needs to know of a window; computed once per forward, on the host where possible.

    segments: n, the last one filled up with padding where the window's length is no multiple of S.
    padding: tokens of that filling, after the last real token.
    access: None where the whole window continues the carried document and is written as a whole.
    local_mask: [r, 1, queries, keys] bool (r may be 1 if all are alike), None for plain causal everywhere.
    masked_R: the segments, of b*n, that local_mask is for, the others being plain causal; None: all.
    rope_q, rope_k: cosines and sines by position in the segment, each [b or 1, 1, positions, d]. Only differences
        within a segment matter to attention, so every segment shares them.
    read: False lets every token find its memory empty (evaluation of what the memory is worth).
    placement: where tokens stand in their segments, beside cached ones and without padding; None: as they come.
    reach_BT: number of earlier tokens of the same document, counted up to 3 (with `read` False, of the same segment
        too); None where no document starts.
    context: the ranks that share the window, of which this one has consecutive segments; None: it has all.
    """

    segments: int
    padding: int
    access: Access | None
    local_mask: Tensor | None
    rope_q: tuple[Tensor, Tensor]
    rope_k: tuple[Tensor, Tensor]
    read: bool
    placement: Placement | None = None
    masked_R: Tensor | None = None
    reach_BT: Tensor | None = None
    context: "ContextGroup | None" = None

    def split(self, x_BTD: Tensor, head_dim: int) -> Tensor:
        """[B, T, heads * d] -> [b, n, heads, s, d], contiguous: one copy here saves many strided passes later."""
        x = F.pad(x_BTD, (0, 0, 0, self.padding)) if self.padding else x_BTD
        x = x.unflatten(2, (-1, head_dim)).unflatten(1, (self.segments, -1))
        return x.transpose(2, 3).contiguous()

    @staticmethod
    def local_masks(host_bns: Tensor, documents_bns: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """local_mask and masked_R from the document number of each token, on the host and on the masks' device."""
        inside = (host_bns[:, :, 0] != host_bns[:, :, -1]).flatten()
        if not (count := int(inside.sum())):
            return None, None
        d, rows = documents_bns.flatten(0, 1), None
        # To a power of two: every other number would be one more shape to compile for.
        if (count := 1 << (count - 1).bit_length()) < len(d):
            rows = inside.int().argsort(descending=True, stable=True)[:count].to(d.device, non_blocking=True)
            d = d.index_select(0, rows)
        return (d[:, :, None] == d[:, None, :]).tril()[:, None], rows


class Mix(nn.Module):
    """(1 - g) A_dot + g A_mem, and A_dot alone where the rule knows nothing; a module, so that hooks can watch."""

    def forward(self, local: Tensor, read: Tensor, gate: Tensor, known: Tensor) -> Tensor:
        return torch.lerp(local, read, gate * known)


class InfiniAttention(nn.Module):
    """Grouped-query Infini-attention (paper, section 2.1), parameter names as in Llama, plus `gate` [H] (beta)."""

    def __init__(self, config: InfiniConfig):
        super().__init__()
        assert config.num_key_value_heads and config.head_dim  # LlamaConfig fills them in
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=bias)
        self.gate = nn.Parameter(torch.full((self.heads,), config.gate_init))
        self.rule = RULES[config.memory](config)
        self.mix = Mix()

    def forward(
        self, x_BTD: Tensor, memory: MemoryState, window: Window, cached: InfiniCacheLayer | None = None
    ) -> tuple[Tensor, MemoryState, Tensor | None]:
        """x_BTD [B, T, hidden] and the memory before the window -> output [B, T, hidden], memory after it, and how
        densely it was written [B, kv heads] in training, where the rule has strengths to choose by.

        `cached` (generation) holds the tokens of the current segment so far, and after the call those then.
        """
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)  # [B, T, heads * d]
        gate, extra = self.rule.of_tokens(x_BTD, q)
        place = window.placement
        if place is not None:
            parts = [k, *extra]
            keys = place.join(cached.keys if cached else None, torch.cat(parts, dim=-1) if extra else k)
            values = place.join(cached.values if cached else None, v)
            (k, *extra), v = keys.split([part.shape[-1] for part in parts], dim=-1), values
            if not place.within:
                q, gate = place.enframe(q), None if gate is None else place.enframe(gate)
        tokens, beta = (k, v, *extra), self.gate.view(-1, 1, 1)
        if gate is not None:
            beta = beta + window.split(gate, 1)  # [b, n, h, s, 1]
        q, k, left = self.rule.queries_and_keys(memory, q, tokens, window)
        q, k, v = (window.split(x, self.head_dim) for x in (q, k, v))  # [b, n, h, s, d]
        local = self._local(q, k, v, window)
        if place is not None and not place.whole_B.any():  # no segment ends here: nothing is written yet
            k, v = k[..., :0, :], v[..., :0, :]

        # Autocast would run the products of the memory in half precision.
        with torch.autocast(x_BTD.device.type, enabled=False):
            groups = self.kv_heads, -1  # query head h reads the memory of h // g
            q = q.unflatten(2, groups)
            read, known, memory, density = self.rule.read_and_write(memory, q, k, v, tokens, window)
            gate = torch.sigmoid(beta.to(read.dtype)).unflatten(-3, groups)
            mixed = self.mix(local.unflatten(2, groups).to(read.dtype), read, gate, known)
            local = mixed.flatten(2, 3).to(local.dtype)
        memory = memory | left

        out = local.transpose(2, 3).flatten(3).flatten(1, 2)  # [B, n * s, heads * d]
        if place is None:
            out = out[:, : x_BTD.shape[1]]
        elif not place.within:
            out = place.pick(out)
        if cached is not None:
            assert place is not None
            cached.store(place.rest(keys), place.rest(values), memory)
        return self.o_proj(out), memory, density

    def _local(self, q: Tensor, k: Tensor, v: Tensor, window: Window) -> Tensor:
        """Causal attention within segment and document, the segments folded into the batch."""
        b, n = q.shape[:2]
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        q, k = rotate(q, *window.rope_q), rotate(k, *window.rope_k)
        attend = partial(F.scaled_dot_product_attention, enable_gqa=self.heads != self.kv_heads)
        mask, rows = window.local_mask, window.masked_R
        if rows is None:
            out = attend(q, k, v, attn_mask=mask, is_causal=mask is None)
        else:  # a mask takes twice the time, and few segments need one
            some_q, some_k, some_v = (x.index_select(0, rows) for x in (q, k, v))
            masked = attend(some_q, some_k, some_v, attn_mask=mask)
            out = attend(q, k, v, is_causal=True).index_copy(0, rows, masked)
        return out.unflatten(0, (b, n))
