"""Infini-attention of one layer: causal attention within the segment, memory for all before it, a gate per head."""

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import InfiniCacheLayer
from .configuration import InfiniConfig
from .fused import rotate
from .memory_rule import MemoryState
from .rules import RULES
from .window import Window

if TYPE_CHECKING:
    pass


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
