"""The memory rule of this project: a gated delta rule on convolved, normalised keys (docs/memory.md).

Shape suffixes as in memory.py; also C channels of q and k together, L tokens (cached ones included), J the last
inputs of the convolution.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .fused import convolve, rms_norm, unit_silu
from .memory_rule import MemoryRule, MemoryState, composed, stepped
from .window import Access
from .writes import delta_writes, solution

if TYPE_CHECKING:
    from .configuration import InfiniConfig
    from .context import ContextGroup
    from .window import Window


class SelectiveDelta(MemoryRule):
    """Gated delta rule on convolved, normalised keys; this project's own (docs/memory.md).

    ```
    q, k      = conv(q), conv(k)                  causal, depthwise, width 4, within the document, so that a value
                                                  lies under the tokens before it; local attention sees them, too
    q, k      = unit(silu(q)), unit(silu(k))      for the memory only
    w         = clamp(1.2 sigmoid(strength(x)) - 0.1, 0, 1)   write strength, per token and key/value head
    forget    M <- exp(-c sum_t w_t) M            once a segment, before its writes; c = exp(forget) + 1 / (16 d)
    write     M <- M + w k (v - k M)^T            token after token: the latest value of a key replaces the older
    read      norm(q (M_s + B))                   RMS norm; M_s is the memory before the token's segment s, 0 before
                                                  a document's first; B is learned, the same for all documents
    mix       A = lerp(A_dot, read, g), g = sigmoid(beta + gate(x))
    ```
    Without B, a model takes what any memory holds for a constant, and fails in a document's first segment, where
    there is none (docs/memory.md).

    A strength can be exactly 0, so that any length of noise leaves the memory as it is, to the bit. Where nothing is
    written nothing is forgotten; where much is written, errors in directions that no key determines fade. After 16 d
    full writes at most 1/e of a value is left: with a rate that could be learned down to 0, errors grew over hundreds
    of segments, longer than training documents, so no gradient told.

    Every write is I - w k k^T, 0 <= w <= 1, |k| <= 1, on what the memory holds: a contraction. With W = sum_t w_t of
    a segment, |M'|^2 <= exp(-2 c W) |M|^2 + W max|v|^2, so |M|^2 <= max|v|^2 (S + 1 / (2 c)) for ever, whatever the
    inputs, at most max|v|^2 (S + 8 d) whatever the parameters, and the normalised read is bounded by its weight.

    Within a chunk of tokens the writes are one triangular system of d columns; the systems of all chunks are solved
    at once. A CPU then goes through a window's chunks one after the other, two products each (`delta_writes`).
    Elsewhere, where many small steps take longer than their arithmetic, and where ranks share a window, chunks become
    maps M' = keep M + add, which are multiplied in pairs and pairs of pairs to those of the segments.
    """

    unit = staticmethod(unit_silu)
    WIDTH = 4  # of the convolution: its last 3 inputs are part of the state
    CHUNK = 64

    def __init__(self, config: "InfiniConfig"):
        super().__init__(config)
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert kv_heads and dim  # LlamaConfig fills them in
        self.dim, self.segment_length = dim, config.segment_length
        self.value_size = config.initializer_range * config.hidden_size**0.5  # rms of v's elements at the start
        self.conv = nn.Parameter(torch.empty(self.WIDTH, (heads + kv_heads) * dim))
        self.strength_weight = nn.Parameter(torch.empty(kv_heads, config.hidden_size))
        self.strength_bias = nn.Parameter(torch.empty(kv_heads))
        self.forget = nn.Parameter(torch.empty(kv_heads))
        self.gate_weight = nn.Parameter(torch.empty(heads, config.hidden_size))
        self.read_norm = nn.Parameter(torch.empty(dim))
        self.base = nn.Parameter(torch.empty(kv_heads, dim, dim))
        self.init_weights()

    def init_weights(self) -> None:
        # Not near the identity: keys must hold the token before from the start (docs/memory.md).
        init.uniform_(self.conv, -0.5, 0.5)
        init.zeros_(self.strength_weight)
        # A strength of one half would let each segment wipe out what the young memory holds, and no gradient would
        # ask for it. Of a random direction, S writes of strength w leave exp(-w S / d): three quarters or more.
        first = min(0.12, self.dim / (4 * self.segment_length))
        init.constant_(self.strength_bias, math.log((first + 0.1) / (1.1 - first)))
        init.constant_(self.forget, -5.0)
        init.zeros_(self.gate_weight)
        # Reads begin as large as a value. At 1 they were seven times the embeddings of a small model with the usual
        # initializer_range of 0.02, and what B holds at first, noise, drowned local attention (docs/memory.md).
        init.constant_(self.read_norm, self.value_size)
        init.normal_(self.base, std=0.02)  # not 0: there a normalised read has no direction and a huge gradient

    def leave_local_attention(self) -> None:
        init.zeros_(self.conv[:-1])
        init.ones_(self.conv[-1])

    @classmethod
    def init_state(cls, config: "InfiniConfig", batch: int, **factory) -> MemoryState:
        """M, and conv [batch, 3, (heads + kv heads) d]."""
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert kv_heads and dim
        channels = (heads + kv_heads) * dim
        conv = torch.zeros(batch, cls.WIDTH - 1, channels, **factory)
        return super().init_state(config, batch, **factory) | {"conv": conv}

    def of_tokens(self, x_BTD: Tensor, q_BTC: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gate; queries, as convolutions of cached tokens are made anew from their inputs; logits of strengths."""
        # Two skinny products in one.
        skinny = F.linear(x_BTD, torch.cat((self.gate_weight, self.strength_weight)))
        gate, strength = skinny.split((len(self.gate_weight), len(self.strength_weight)), dim=-1)
        return gate, [q_BTC, strength + self.strength_bias]

    def queries_and_keys(
        self, state: MemoryState, q_BTC: Tensor, tokens: tuple[Tensor, ...], window: "Window"
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """Convolved; in a frame with cached tokens queries are made from their inputs, too."""
        (k, _, q, *_), before, place = tokens, state["conv"], window.placement
        last = self.last_inputs(before, (q, k), None if place is None else place.first_B, window.reach_BT)
        if window.context is not None:
            dropped = torch.zeros(len(last), dtype=torch.bool, device=last.device)
            before, last = window.context.carried(before, last, dropped)
        q, k = self.convolve(before, (q, k), window.reach_BT)
        return (place.pick(q) if place is not None and place.within else q), k, {"conv": last}

    def read_and_write(
        self,
        state: MemoryState,
        q_bnkgsd: Tensor,
        k_bnksd: Tensor,
        v_bnkse: Tensor,
        tokens: tuple[Tensor, ...],
        window: "Window",
    ) -> tuple[Tensor, Tensor, MemoryState, Tensor | None]:
        strength = window.split(tokens[3], 1)[..., 0]
        read, known, after = self.attend(
            state, q_bnkgsd, k_bnksd, v_bnkse, window.access, strength, window.read, window.context
        )
        return read, known, after, self.density(strength, window.context) if self.training else None

    def convolve(self, before_BJC: Tensor, parts: tuple[Tensor, ...], reach_BT: Tensor | None) -> list[Tensor]:
        """Causal depthwise convolution of each of q, k [B, L, .] behind its last inputs; reach_BT: earlier tokens
        of the same document, counted up to 3, of each token (None: all)."""
        sizes = [part.shape[-1] for part in parts]
        reach_BL = None if reach_BT is None else reach_BT[:, : parts[0].shape[1]]
        both = zip(before_BJC.to(parts[0].dtype).split(sizes, -1), parts, self.conv.split(sizes, -1), strict=True)
        # Autocast would return float32 to local attention.
        return [convolve(before, part, weight, reach_BL).to(part.dtype) for before, part, weight in both]

    def last_inputs(
        self, before_BJC: Tensor, parts: tuple[Tensor, ...], at_B: Tensor | None, reach_BT: Tensor | None
    ) -> Tensor:
        """The 3 inputs before token at_B (None: the end) of the same document as the one just before it."""
        steps = torch.arange(self.WIDTH - 1, device=parts[0].device)
        if at_B is not None:
            x_BLC = torch.cat(parts, dim=-1)
            padded = torch.cat((before_BJC, x_BLC.to(before_BJC.dtype)), dim=1)
            return padded.take_along_dim((at_B.to(padded.device)[:, None] + steps)[..., None], dim=1)
        # Of a window that may be long, in another dtype, only its end is copied.
        end_BLC = torch.cat([part[:, 1 - self.WIDTH :] for part in parts], dim=-1).to(before_BJC.dtype)
        last = torch.cat((before_BJC, end_BLC), dim=1)[:, 1 - self.WIDTH :]
        if reach_BT is not None:
            far = self.WIDTH - 2 - steps  # the last token is 0 before itself
            last = torch.where((reach_BT[:, -1:] >= far)[..., None], last, 0)
        return last

    def attend(
        self,
        state: MemoryState,
        q_bnkgsd: Tensor,
        k_bnksd: Tensor,
        v_bnkse: Tensor,
        access: Access | None,
        strength_bnks: Tensor,
        reads: bool = True,
        context: "ContextGroup | None" = None,
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """Read for every token, then write, from convolved projections and logits of write strengths; the state
        returned lacks `conv`. reads: False finds every memory empty."""
        dtype = state["M"].dtype
        before, last = state["M"][:, None], state["M"]
        if k_bnksd.shape[-2]:
            w_bnks = self.strength(strength_bnks.to(dtype))
            if access is not None:
                w_bnks = w_bnks * access.write_bns[:, :, None]
            written = k_bnksd.to(dtype), v_bnkse.to(dtype), w_bnks
            keep_bn = None if access is None else access.keep_bn
            if context is None and last.device.type == "cpu" and not self.as_on_gpu:
                before, last = self.write_in_turn(last, *written, keep_bn)
            else:
                before, last = self.write_at_once(last, *written, keep_bn, context)
        groups, base = q_bnkgsd.shape[3:5], self.base.to(dtype)
        rows = self.unit(q_bnkgsd.to(dtype)).flatten(3, 4)
        if not reads:
            found = rows @ base
        elif access is None:
            found = rows @ (before + base)
        else:
            own = access.read_bns[:, :, None, None, :, None]
            found = torch.where(own, (rows @ before).unflatten(3, groups), 0).flatten(3, 4) + rows @ base
        read = rms_norm(found, self.read_norm.to(dtype), 1e-6)
        known = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool, device=read.device)
        return read.unflatten(3, groups), known, {"M": last}

    def fading(self) -> Tensor:
        """The rate of forgetting c of each key/value head, [k]."""
        return torch.exp(self.forget) + 1 / (16 * self.dim)

    @staticmethod
    def strength(logits: Tensor) -> Tensor:
        return (1.2 * torch.sigmoid(logits) - 0.1).clamp(0, 1)

    @classmethod
    def density(cls, logits_bnks: Tensor, context: "ContextGroup | None" = None) -> Tensor:
        """Mean strength of a window's tokens over its root mean square; [b, k], 0 (nothing) to 1 (all alike).

        A price for it makes the memory choose. It does not depend on the strengths' scale, which a normalised read
        does not see either: a price of the mean strength just shrinks all of them alike.
        """
        w_bnks = cls.strength(logits_bnks.to(torch.promote_types(logits_bnks.dtype, torch.float32)))
        mean, square = w_bnks.mean((1, 3)), w_bnks.square().mean((1, 3))
        if context is not None:
            each = zip(*context.gather(mean, square), strict=True)
            mean, square = (torch.stack(of_ranks).mean(0) for of_ranks in each)
        return mean * torch.rsqrt(square + 1e-6)

    def write_in_turn(
        self, memory: Tensor, k: Tensor, v: Tensor, w: Tensor, keep_bn: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The memory before each segment, [b, n, k, d, d], and after the last."""
        fade_nbk, drop = self.fade(w).transpose(0, 1), None
        if keep_bn is not None:
            drop = ~keep_bn.T[..., None].expand_as(fade_nbk)
            fade_nbk = fade_nbk.masked_fill(drop, 0)
        memories = delta_writes(memory, fade_nbk, drop, *self.chunks(k, v, w, first=(1, 3)))
        return memories[:-1].transpose(0, 1), memories[-1].clone()  # a view would keep all segments' for the lanes

    def write_at_once(
        self,
        memory: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        keep_bn: Tensor | None,
        context: "ContextGroup | None" = None,
    ) -> tuple[Tensor, Tensor]:
        """As `write_in_turn`; of the ranks of `context`, the memory before each segment of this rank."""
        kept, added = self.segment_maps(k, v, w)
        last = None
        if context is not None:
            keep, add = composed(kept, added, keep_bn)
            memory, last = context.carried(memory, add, None if keep_bn is None else keep_bn.all(1), keep)
        memories = stepped(memory, kept, added, keep_bn)
        return memories[:, :-1], memories[:, -1].clone() if last is None else last

    def segment_maps(self, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """The writes of each segment as M' = keep M + add, both [b, n, k, d, d]; w [b, n, k, s] in [0, 1]."""
        fade = self.fade(w)[..., None, None]
        k, v, w = self.chunks(k, v, w, first=())
        # A chunk's writes are M' = (I - X^T K) M + X^T V with X as in `delta_writes`.
        x_t = (solution(k @ k.mT * w[..., None], k) * w[..., None]).mT
        kept, added = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - x_t @ k, x_t @ v
        while (count := kept.shape[3]) > 1:
            pairs = (x[:, :, :, : count // 2 * 2].unflatten(3, (-1, 2)).unbind(4) for x in (kept, added))
            (keep, then_keep), (add, then_add) = pairs
            keep, add = then_keep @ keep, then_keep @ add + then_add
            if count % 2:
                keep, add = (torch.cat((x, of[:, :, :, -1:]), dim=3) for x, of in ((keep, kept), (add, added)))
            kept, added = keep, add
        return kept[:, :, :, 0] * fade, added[:, :, :, 0]

    def chunks(self, k: Tensor, v: Tensor, w: Tensor, first: tuple[int, ...]) -> list[Tensor]:
        """[b, n, k, s, ...] -> [b, n, k, m, t, ...] of m chunks, then those dimensions first; keys of unit length."""
        size = k.shape[-2]
        each = min(self.CHUNK, size)
        if missing := -size % each:  # nothing is written there: w = 0
            k, v, w = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing)), F.pad(w, (0, missing))
        k, v, w = (x.unflatten(3, (-1, each)).movedim(first, tuple(range(len(first)))) for x in (k, v, w))
        return [self.unit(k), v, w]

    def fade(self, w_bnks: Tensor) -> Tensor:
        """What each segment leaves of the memory before it writes, [b, n, k]."""
        return torch.exp(-self.fading().to(w_bnks.dtype) * w_bnks.sum(-1))
