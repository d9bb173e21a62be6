"""Infini-attention of one layer (arXiv 2404.07143, section 2.1).

Every token attends causally within its segment, and reads a compressive memory of all segments before; a gate per
head mixes the two. All segments of a window are computed at once. Shape suffixes are those of memory_rule.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import InfiniCacheLayer
from .configuration import InfiniConfig
from .fused import RMSNorm, rotate, rotate_token
from .memory_rule import MemoryState, without_autocast
from .rules import RULES
from .window import Window

# What local attention carries beside the rule's state, with a sliding window.
NEAR_STATE = ("near_k", "near_v", "near")


class Mix(nn.Module):
    """(1 - share) A_dot + share A_mem, and A_dot alone where `known` is false; a Module, for the hooks of metrics."""

    def forward(self, local: Tensor, read: Tensor, share: Tensor, known: Tensor) -> Tensor:
        return torch.lerp(local, read, share * known)


class InfiniAttention(nn.Module):
    """Grouped-query Infini-attention.

    The projections are named as in Llama, and the norms of queries and keys as in Qwen3. `gate` [query heads] is beta
    of the paper, and `rule` the memory rule.
    Query head h reads the memory of key/value head h // (query heads / key/value heads).
    """

    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.head_sizes
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        self.gate = nn.Parameter(torch.full((self.heads,), config.gate_init))
        self.rule = RULES[config.memory](config)
        self.mix = Mix()

    def forward(
        self, x_BTD: Tensor, memory: MemoryState, window: Window, cached: InfiniCacheLayer | None = None
    ) -> tuple[Tensor, MemoryState, Tensor | None]:
        """Attend over one window.

        Args:
            x_BTD: normalised hidden states, [B, T, hidden].
            memory: the state before the window.
            window: the layout of the call: segments, masks and which tokens access the memory.
            cached: in generation, the cache of this layer: the current segment's tokens so far. It is updated in
                place.

        Returns:
            the output [B, T, hidden], the state after the window, and the mean write strengths [2, B, kv heads]
            (`memory_rule.RuleOutput`).
        """
        # Project, and let the rule compute its per-token features.
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)  # [B, T, heads * d]
        if self.qk_norm:
            q, k = (
                norm(x.unflatten(2, (-1, self.head_dim))).flatten(2)
                for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        place = window.placement
        if place is not None and place.appends:
            assert cached is not None
            return self._append(x_BTD, q, k, v, cached, window), memory, None
        gate_offset, features = self.rule("token_features", x_BTD, q)  # a method of the rule: see its `forward`

        # With a cache only: bring cached and new tokens into frames that begin at a segment boundary. Keys and
        # features are cached side by side, as one tensor.
        if place is not None:
            assert cached is not None
            widths = [part.shape[-1] for part in (k, *features.values())]
            packed = torch.cat((k, *features.values()), dim=-1) if features else k
            packed = place.join(cached.keys, packed)
            v = values = place.join(cached.values, v)
            k, *parts = packed.split_with_sizes(widths, dim=-1) if features else (packed,)
            features = dict(zip(features, parts, strict=True))
            if not place.within:
                q = place.enframe(q)
                gate_offset = None if gate_offset is None else place.enframe(gate_offset)

        # Cut everything into segments: [b, n, heads, s, d].
        # `other_state`: the parts of the state that are not the memory itself.
        q, k, other_state = self.rule("local_queries_and_keys", memory, q, k, features, window)
        q, k, v = (window.split(x, self.head_dim) for x in (q, k, v))
        b, n, _, s, _ = q.shape
        grouped = b, n, self.kv_heads, -1, s  # query heads by key/value head
        # The logit of the memory's share: beta of the head and, under some rules, an offset of the token.
        logit = self.gate.view(self.kv_heads, -1, 1, 1)
        if gate_offset is not None:
            logit = logit + window.split(gate_offset, 1).view(*grouped, 1)

        local_k, local_v = k, v  # what local attention takes: with a sliding window, also what comes before a segment
        if window.near:
            *before, near_state = self._before_segments(memory, k, v, window)
            other_state = other_state | near_state  # also carried where this step does not attend to it
            if not window.own_segment:
                local_k, local_v = (torch.cat(parts, dim=-2) for parts in zip(before, (k, v), strict=True))
        local, local_kv = self._local_attention(q, local_k, local_v, window)

        # Read the memory, write to it, and mix. Autocast is off, because the memory must stay in float32.
        if place is not None and not place.writes:  # no segment is complete, so nothing is written
            k, v = k.narrow(-2, 0, 0), v.narrow(-2, 0, 0)
        with without_autocast(x_BTD):
            q = q.view(*grouped, self.head_dim)
            read, known, memory, strengths = self.rule("read_and_write", memory, q, k, v, features, window)
            share = torch.sigmoid(logit.to(read.dtype))
            mixed = self.mix(local.view_as(q).to(read.dtype), read, share, known)
            mixed = mixed.to(local.dtype)
        memory = memory | other_state

        # Back to rows of tokens, without the padding of the last segment.
        out = mixed.movedim(-2, 2).reshape(b, n * s, self.heads * self.head_dim)
        if place is None:
            out = out[:, : x_BTD.shape[1]]
        elif not place.within:
            out = place.pick(out)
        if place is not None:
            assert cached is not None
            cached.store(place.rest(packed), place.rest(values), local_kv if place.appendable else None, memory)
        return self.o_proj(out), memory, strengths

    def _append(
        self, x_B1D: Tensor, q: Tensor, k: Tensor, v: Tensor, cached: InfiniCacheLayer, window: Window
    ) -> Tensor:
        """The output for a token that is appended to each row's segment in place; q, k, v: its projections."""
        key_query, read, share = self.rule("append", x_B1D, q, k, self.gate, cached, window)
        batch = x_B1D.shape[0]
        both = rotate_token(key_query.view(batch, -1, 1, self.head_dim), *window.rope_q)
        k, q = both.split_with_sizes((self.kv_heads, self.heads), dim=1)
        k, v = cached.append_local(k, v.view(batch, self.kv_heads, 1, self.head_dim), window)
        # The query heads of one key/value head are rows of one product: no key is repeated.
        q = q.view(batch, self.kv_heads, -1, self.head_dim)
        local = F.scaled_dot_product_attention(q, k, v)
        mixed = torch.lerp(local.to(read.dtype), read, share).to(local.dtype)
        return self.o_proj(mixed.reshape(batch, 1, self.heads * self.head_dim))

    @staticmethod
    def init_state(config: InfiniConfig, batch: int, **factory) -> MemoryState:
        """The empty state of a layer: that of its memory rule and, with a sliding window, keys (without RoPE) and
        values [batch, kv heads, near, d] of the last tokens, and `near` [batch, near], 1 for those of the document in
        progress."""
        state = RULES[config.memory].init_state(config, batch, **factory)
        if near := config.near_length:
            _, kv_heads, dim = config.head_sizes
            shape = batch, kv_heads, near, dim
            keys, values = torch.zeros(shape, **factory), torch.zeros(shape, **factory)
            state |= {"near_k": keys, "near_v": values, "near": torch.zeros(batch, near, **factory)}
        return state

    @staticmethod
    def _before_segments(
        memory: MemoryState, k: Tensor, v: Tensor, window: Window
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """Return what comes before each segment: the last `near` keys and values of the segment before it.

        Returns:
            keys and values [b, n, kv heads, near, d]; and those to carry to the next window, without views.
        """
        assert window.near_after_BP is not None
        place, preceding, state = window.placement, [], {"near": window.near_after_BP}
        carried = [memory[name].to(x.dtype) for name, x in (("near_k", k), ("near_v", v))]
        if window.context is not None:
            rank_ends = torch.stack([x[:, -1, :, -window.near :] for x in (k, v)])
            carried = list(window.context.shifted(torch.stack(carried), rank_ends).unbind())
        for name, x, before in (("near_k", k, carried[0]), ("near_v", v, carried[1])):
            if x.shape[-2] < window.near or (place is not None and not place.writes):  # no complete segment
                preceding.append(before[:, None])
                state[name] = before
                continue
            segment_ends = x[..., -window.near :, :]  # [b, n, kv heads, near, d]
            borders = torch.cat((before[:, None], segment_ends), dim=1)  # before each segment and after the last
            whole = [-1] * len(x) if place is None else place.whole_B.tolist()
            state[name] = torch.stack([row[i] for row, i in zip(borders, whole, strict=True)])
            preceding.append(borders[:, :-1])
        return preceding[0], preceding[1], state

    def _local_attention(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Causal attention within the document, with the segments folded into the batch.

        Returns:
            its output [b * n, heads, s, d]; and the keys, with RoPE, and values that it took, [b * n, kv heads, any,
            d].
        """
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        if window.rope_q[0] is window.rope_k[0]:  # no keys before the segment, so one call rotates both
            both = rotate(torch.cat((q, k), dim=1), *window.rope_q)
            q, k = both[:, : self.heads], both[:, self.heads :]
        else:
            q, k = rotate(q, *window.rope_q), rotate(k, *window.rope_k)
        shared, own, rows = window.local
        if own is not None and rows is None:
            return attend(q, k, v, own), (k, v)
        out = attend(q, k, v, shared)
        if rows is not None:  # a mask takes twice the time of plain causal attention, and few segments need their own
            some_q, some_k, some_v = (x.index_select(0, rows) for x in (q, k, v))
            out = out.index_copy(0, rows, attend(some_q, some_k, some_v, own))
        return out, (k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries [b, heads, s, d] to keys and values [b, kv heads, any, d]: causal without a mask, except
    that a single query attends to all keys.

    With a mask, torch's fused kernels for GPUs take as many key/value heads as query heads; given fewer it computes
    plain products, which hold all scores. There the heads are repeated, as transformers does (`use_gqa_in_sdpa`).
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    if mask is not None and q.device.type != "cpu" and heads != kv_heads:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        kv_heads = heads
    causal = mask is None and bool(q.shape[-2] > 1)  # bool: torch.export may hold a symbolic shape
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=heads != kv_heads)
