"""selective-delta: a gated delta rule on convolved, normalised keys; this project's own memory rule.

Per key/value head: x is the layer's input, M the matrix that a document's earlier segments have left (0 before its
first), B a learned matrix that is the same for all documents, S the segment length and d the head dimension. conv,
strength and gate are learned linear maps, and unit(y) = y / |y|.

    q, k      = conv(q), conv(k)             causal, depthwise, width 4, within the document, so that a value is
                                             stored under a key that also depends on the tokens before it. Local
                                             attention uses the convolved q and k, too.
    q, k      = unit(silu(q)), unit(silu(k))                     for the memory only
    w         = clamp(1.2 sigmoid(strength(x)) - 0.1, 0, 1)      write strength of a token
    forget    M <- exp(-c sum_t w_t) M                           once per segment, before its writes
                                                                 c = exp(r) + 1 / (16 d); r is `forget`
    write     M <- M + w_t k_t^T (v_t - k_t M)                   token after token; k_t and v_t are rows
    read      norm(q (M + B))                                    RMS norm; M is the memory before the segment
    mix       lerp(A_dot, read, g), g = sigmoid(beta + gate(x))

Why it is built like this:

- A write strength can be exactly 0 (the stretched sigmoid of arXiv 1712.01312), so noise of any length leaves the
  memory bit for bit as it is. A segment that writes nothing forgets nothing; where much is written, errors fade in
  directions that no key overwrites. Gated DeltaNet (arXiv 2412.06464) decays at every token instead.
- c is at least 1 / (16 d): after 16 d writes of strength 1 at most 1/e of a value is left. When c could be learned
  down to 0, errors grew over hundreds of segments. Training documents are shorter, so no gradient prevented this.
- Without B, a new model relies on what every memory holds as if it were a constant, and then fails in a document's
  first segment, where the memory is empty. An imported model, which has learned to do without a memory, has no B
  (`memory_base`): a memory that holds nothing is not read, and local attention stays as it is.

Why it is bounded for any input: a write multiplies what the memory holds by I - w k^T k with 0 <= w <= 1, |k| <= 1,
which is a contraction. With W = sum_t w_t of a segment, |M'|^2 <= exp(-2 c W) |M|^2 + W max|v|^2, hence
|M|^2 <= max|v|^2 (S + 1 / (2 c)) <= max|v|^2 (S + 8 d) after any number of segments. The normalised read is bounded
by the weight of its norm.

How a segment's writes run in parallel (the form that arXiv 2406.06484 gives the delta rule): let U have the rows
u_t = w_t (v_t - k_t M_(t-1)), so that M_t = M_0 + sum_(i <= t) k_i^T u_i. Substituting M_(t-1) gives

    u_t = w_t (v_t - k_t M_0 - sum_(i < t) (k_t k_i^T) u_i),        or, with w as a diagonal matrix,
    (I + L) U = w (V - K M_0),    L = tril(w K K^T, -1)
    M_t = M_0 + K^T U = M_0 + X^T (V - K M_0),    X = w (I + L)^-T K

X is the solution of a triangular system with d right-hand sides. It does not depend on M_0, so the systems of all
chunks (WRITE_CHUNK tokens each) of a window are solved at once. The memories then follow in one of two ways. On a
CPU, the chunks are applied one after the other, with two products each (`delta_writes`). On a GPU, many small steps
take longer than their arithmetic. There, and wherever ranks share a window, each chunk becomes the map
M' = (I - X^T K) M + X^T V, and neighbouring maps are composed in pairs until one is left for each segment. naive.py
has the same rule as a loop over tokens.

Shape suffixes are those of memory_rule.py; in addition, C counts the channels of q and k together, J the last inputs
of the convolution, m the chunks of a segment and t the tokens of a chunk.
"""

import math
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .fused import UNIT_EPS, convolve, rms_norm, unit_silu
from .memory_rule import Appended, MemoryRule, MemoryState, RuleOutput, affine_scan, without_autocast
from .window import CONV_REACH
from .writes import delta_writes, solution

if TYPE_CHECKING:
    from .configuration import InfiniConfig
    from .context import ContextGroup
    from .window import Window

WIDTH = CONV_REACH + 1  # width of the convolution, whose last CONV_REACH inputs are part of the state
WRITE_CHUNK = 64  # number of tokens whose writes form one triangular system
READ_EPS = 1e-6  # of the norm of what is read


class SelectiveDelta(MemoryRule):
    """The rule that the module's docstring derives. State: M [b, k, d, d] and conv
    [b, 3, (heads + kv heads) d], the last inputs of the convolution, queries before keys."""

    gate_parameters: ClassVar = ("gate_weight", "strength_weight", "strength_bias", "forget")
    vector_parameters: ClassVar = ("conv",)
    # In a document's first segment the read is norm(q B), whose gradient grows as B shrinks. Decay would also weigh
    # B less and less against what the memory holds.
    undecayed_parameters: ClassVar = ("base",)
    trained_by_later_segments: ClassVar = "write strengths and forgetting"
    trained_at_gate_lr: ClassVar = "gates, write strengths and forgetting"
    chooses_writes: ClassVar = True
    unit = staticmethod(unit_silu)

    def __init__(self, config: "InfiniConfig"):
        super().__init__(config)
        heads, kv_heads, dim = config.head_sizes
        self.segment_length = config.segment_length
        self.value_size = config.initializer_range * config.hidden_size**0.5  # rms of v's elements at the start
        self.conv = nn.Parameter(torch.empty(WIDTH, (heads + kv_heads) * dim))
        self.strength_weight = nn.Parameter(torch.empty(kv_heads, config.hidden_size))
        self.strength_bias = nn.Parameter(torch.empty(kv_heads))
        self.forget = nn.Parameter(torch.empty(kv_heads))
        self.gate_weight = nn.Parameter(torch.empty(heads, config.hidden_size))
        self.read_norm = nn.Parameter(torch.empty(dim))
        self.base = nn.Parameter(torch.empty(kv_heads, dim, dim)) if config.memory_base else None
        self.init_weights()

    def init_weights(self) -> None:
        # This is not near the identity, because keys must depend on the preceding tokens from the start.
        init.uniform_(self.conv, -0.5, 0.5)
        init.zeros_(self.strength_weight)
        # With an initial strength of one half each segment would overwrite what an untrained memory holds, and no
        # gradient would lead the model to use it. S writes of strength w leave exp(-w S / d) of a random direction;
        # with this strength that is three quarters or more.
        first = min(0.12, self.dim / (4 * self.segment_length))
        init.constant_(self.strength_bias, math.log((first + 0.1) / (1.1 - first)))
        init.constant_(self.forget, -5.0)
        init.zeros_(self.gate_weight)
        # Reads start as large as a value. With a weight of 1 they were seven times as large as the embeddings of a
        # small model with the usual initializer_range of 0.02, and the noise that B holds at first drowned local
        # attention.
        init.constant_(self.read_norm, self.value_size)
        if self.base is not None:
            init.normal_(self.base, std=0.02)  # from 0, a normalised read would have no direction and a huge gradient

    def keep_local_attention(self) -> None:
        """Make the convolution the identity."""
        init.zeros_(self.conv[:-1])
        init.ones_(self.conv[-1])

    @classmethod
    def init_state(cls, config: "InfiniConfig", batch: int, **factory) -> MemoryState:
        heads, kv_heads, dim = config.head_sizes
        conv = torch.zeros(batch, CONV_REACH, (heads + kv_heads) * dim, **factory)
        return super().init_state(config, batch, **factory) | {"conv": conv}

    # ---- before rows are cut into segments

    def token_features(self, x_BTD: Tensor, q_BTC: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The offset of the gate's logit; as features, the logits of the write strengths and the projected queries.

        Generation caches the queries because it convolves all tokens of the current segment again in every call.
        """
        # One product instead of two narrow ones.
        logits = F.linear(x_BTD, torch.cat((self.gate_weight, self.strength_weight)))
        gate, strength = logits.split((len(self.gate_weight), len(self.strength_weight)), dim=-1)
        return gate, {"query_input": q_BTC, "strength_logit": strength + self.strength_bias}

    def local_queries_and_keys(
        self, state: MemoryState, q_BTC: Tensor, k_BLC: Tensor, features: dict[str, Tensor], window: "Window"
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """Convolve queries and keys, continuing from the last inputs in the state, and return the window's last."""
        parts, before, place = (features["query_input"], k_BLC), state["conv"], window.placement
        last = self.last_inputs(before, parts, None if place is None else place.first_B, window.conv_reach_BT)
        if window.context is not None:
            before = window.context.shifted(before, last)
        q, k = self.convolve(before, parts, window.conv_reach_BT)
        return (place.pick(q) if place is not None and place.within else q), k, {"conv": last}

    def convolve(self, before_BJC: Tensor, parts: tuple[Tensor, ...], conv_reach_BT: Tensor | None) -> list[Tensor]:
        """Causal depthwise convolution of queries and keys.

        Args:
            before_BJC: the last inputs before the first token, of queries and keys side by side.
            parts: queries and keys, each [B, L, any].
            conv_reach_BT: for each token, how many of the 3 tokens before it belong to its document; None: all 3.
        """
        sizes = [part.shape[-1] for part in parts]
        conv_reach_BL = None if conv_reach_BT is None else conv_reach_BT[:, : parts[0].shape[1]]
        befores, weights = before_BJC.to(parts[0].dtype).split(sizes, -1), self.conv.split(sizes, -1)
        # Under autocast the convolution returns float32, which local attention must not get.
        return [
            convolve(before, part, weight, conv_reach_BL).to(part.dtype)
            for before, part, weight in zip(befores, parts, weights, strict=True)
        ]

    def last_inputs(
        self, before_BJC: Tensor, parts: tuple[Tensor, ...], at_B: Tensor | None, conv_reach_BT: Tensor | None
    ) -> Tensor:
        """The three inputs before token at_B of each row (None: the last three of the window), [B, 3, C].

        At the end of a window, inputs of other documents than that of the last token are 0.
        """
        steps = torch.arange(CONV_REACH, device=parts[0].device)
        if at_B is not None:
            x_BLC = torch.cat(parts, dim=-1)
            padded = torch.cat((before_BJC, x_BLC.to(before_BJC.dtype)), dim=1)
            return padded.take_along_dim((at_B.to(padded.device)[:, None] + steps)[..., None], dim=1)
        # Only the end of a window, which may be long and in another dtype, is copied.
        end_BLC = torch.cat([part[:, -CONV_REACH:] for part in parts], dim=-1).to(before_BJC.dtype)
        last = torch.cat((before_BJC, end_BLC), dim=1)[:, -CONV_REACH:]
        if conv_reach_BT is not None:
            distance = CONV_REACH - 1 - steps  # to the last token
            last = torch.where((conv_reach_BT[:, -1:] >= distance)[..., None], last, 0)
        return last

    # ---- segments

    def read_and_write(self, state, q_bnkgsd, k_bnksd, v_bnkse, features, window: "Window") -> RuleOutput:
        dtype, access = state["M"].dtype, window.access

        # The memory before each segment, and after the window.
        before, last = state["M"][:, None], state["M"]
        if k_bnksd.shape[-2]:
            w_bnks = self.strength(window.split(features["strength_logit"], 1)[..., 0].to(dtype))
            if access is not None:
                w_bnks = w_bnks * access.write_bns[:, :, None]
            written = k_bnksd.to(dtype), v_bnkse.to(dtype), w_bnks
            keep_bn = None if access is None else access.keep_bn
            if window.context is None and last.device.type == "cpu" and not self.as_on_gpu:
                before, last = self.write_in_turn(last, *written, keep_bn)
            else:
                before, last = self.write_at_once(last, *written, keep_bn, window.context)

        # Reads: of the memory and B together, or of B alone where a token may not read the memory.
        groups, base = q_bnkgsd.shape[3:5], None if self.base is None else self.base.to(dtype)
        rows = self.unit(q_bnkgsd.to(dtype)).flatten(3, 4)
        may_read = None if access is None else access.read_bns[:, :, None, None, :, None]
        if not window.reads_memory:
            found = torch.zeros_like(rows) if base is None else rows @ base
        elif may_read is None:
            found = rows @ (before if base is None else before + base)
        else:
            found = torch.where(may_read, (rows @ before).unflatten(3, groups), 0).flatten(3, 4)
            found = found if base is None else found + rows @ base
        read = rms_norm(found, self.read_norm.to(dtype), READ_EPS)
        if base is not None:  # there is always something to read
            known = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool, device=read.device)
        else:
            filled = torch.linalg.vector_norm(before, ord=math.inf, dim=(-2, -1)) > 0
            known = (
                filled[..., None, None, None]
                if window.reads_memory
                else torch.zeros_like(filled)[..., None, None, None]
            )
            known = known if may_read is None else known & may_read
        strengths = None
        if self.training:
            logits_bnks = window.split(features["strength_logit"], 1)[..., 0]
            tokens_bns = window.tokens_bns(logits_bnks.shape[-1], logits_bnks.device)
            strengths = self.mean_strengths(logits_bnks, tokens_bns)
        return RuleOutput(read.unflatten(3, groups), known, {"M": last}, strengths)

    def append(self, x_B1D, q_B1C, k_B1C, beta, cached, window: "Window") -> Appended:
        assert cached.memory is not None and window.placement is not None
        if cached.prepared is None:
            cached.prepared = self.prepare(cached.memory, beta)
        prepared = cached.prepared
        logits = F.linear(x_B1D, prepared["weight"], prepared["bias"])
        gate, strength = logits.split_with_sizes((self.kv_heads * self.groups, self.kv_heads), dim=-1)

        # Convolve the last four inputs of key and queries. The cache has keys first, the state queries first.
        tokens = cached.append_key(torch.cat((k_B1C, q_B1C, strength), dim=-1), window.placement)
        conv, keys = prepared["conv"], self.kv_heads * self.dim
        inputs = tokens.all(max(window.placement.cached - CONV_REACH, 0)).narrow(-1, 0, conv.shape[-1])
        if (missing := WIDTH - inputs.shape[1]) > 0:
            q, k = cached.memory["conv"][:, -missing:].to(inputs.dtype).tensor_split((-keys,), dim=-1)
            inputs = torch.cat((torch.cat((k, q), dim=-1), inputs), dim=1)
        key_query = (inputs * conv).sum(1, keepdim=True).to(k_B1C.dtype)

        with without_autocast(x_B1D):
            m = prepared["M"]
            q = key_query.narrow(-1, keys, keys * self.groups).to(m.dtype)
            # unit(q) times the root of d, by which M has been divided
            rows = torch.rms_norm(
                F.silu(q.reshape(-1, self.groups, self.dim)), (self.dim,), None, UNIT_EPS / self.dim
            )
            read = torch.rms_norm(rows.bmm(m), (self.dim,), prepared["read_norm"], READ_EPS)
            share = torch.sigmoid(gate.to(m.dtype)).view(-1, self.kv_heads, self.groups, 1)
            if "known" in prepared:
                share = share * prepared["known"]
        return Appended(key_query, read.view(-1, self.kv_heads, self.groups, self.dim), share)

    def prepare(self, state: MemoryState, beta: Tensor) -> dict[str, Tensor]:
        """What `append` needs of the memory and the parameters, in the form that takes it the fewest operations."""
        m, base = state["M"], self.base
        queries, keys = self.conv.tensor_split((-self.kv_heads * self.dim,), dim=-1)
        found = {
            "weight": torch.cat((self.gate_weight, self.strength_weight)),
            "bias": torch.cat((beta, self.strength_bias)),
            "conv": torch.cat((keys, queries), dim=-1),
            "read_norm": self.read_norm.to(m.dtype),
            "M": ((m if base is None else m + base.to(m.dtype)) * self.dim**-0.5).flatten(0, 1),
        }
        if base is None:
            found["known"] = (torch.linalg.vector_norm(m, ord=math.inf, dim=(-2, -1)) > 0)[..., None, None]
        return found

    def decay_rate(self) -> Tensor:
        """The rate c of each key/value head at which the memory decays, [k], at least in float32.

        exp(60) times the smallest strength above 0 forgets all; an infinite c times a strength of 0 would be NaN.
        """
        forget = self.forget.to(torch.promote_types(self.forget.dtype, torch.float32))
        return torch.exp(forget.clamp_max(60)) + 1 / (16 * self.dim)

    @staticmethod
    def strength(logits: Tensor) -> Tensor:
        """Write strengths, from 0 to 1, computed from their logits."""
        return (1.2 * torch.sigmoid(logits) - 0.1).clamp(0, 1)

    @classmethod
    def mean_strengths(cls, logits_bnks: Tensor, tokens_bns: Tensor | None = None) -> Tensor:
        """`RuleOutput.strengths` of a window.

        tokens_bns: bool [b or 1, n, s], which positions hold a token; None: all.
        """
        w_bnks = cls.strength(logits_bnks.to(torch.promote_types(logits_bnks.dtype, torch.float32)))
        count: int | Tensor = w_bnks.shape[1] * w_bnks.shape[3]
        if tokens_bns is not None:
            w_bnks = torch.where(tokens_bns[:, :, None], w_bnks, 0)
            count = tokens_bns.sum((1, 2)).clamp_min(1)[:, None]
        mean, square = w_bnks.sum((1, 3)) / count, w_bnks.square().sum((1, 3)) / count
        return torch.stack((mean, square))

    def write_in_turn(
        self, memory: Tensor, k: Tensor, v: Tensor, w: Tensor, keep_bn: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Write chunk after chunk; return the memory before each segment, [b, n, k, d, d], and after the last one.

        Args:
            memory: [b, k, d, d].
            k, v, w: convolved keys and values [b, n, k, s, d], write strengths [b, n, k, s].
            keep_bn: bool, false where the memory before a segment is of another document; None: all true.
        """
        decay_nbk, drop = self.decay(w).transpose(0, 1), None
        if keep_bn is not None:
            drop = ~keep_bn.T[..., None].expand_as(decay_nbk)
        memories = delta_writes(memory, decay_nbk, drop, *self.chunks(k, v, w, first=(1, 3)))
        return memories[:-1].transpose(0, 1), memories[-1].clone()  # a view would keep all of them alive

    def write_at_once(
        self,
        memory: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        keep_bn: Tensor | None,
        context: "ContextGroup | None" = None,
    ) -> tuple[Tensor, Tensor]:
        """Like `write_in_turn`, but with one map for each segment. With `context`, the segments are those of this
        rank, and `memory` that before the window."""
        memories = affine_scan(memory, *self.segment_maps(k, v, w), keep_bn, context)
        return memories[:, :-1], memories[:, -1].clone()

    def segment_maps(self, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """The writes of each segment as M' = transition M + added, both [b, n, k, d, d]."""
        decay = self.decay(w)[..., None, None]
        k, v, w = self.chunks(k, v, w, first=())
        x_t = (solution(k @ k.mT * w[..., None], k) * w[..., None]).mT  # X^T
        transition, added = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - x_t @ k, x_t @ v
        # Compose neighbouring maps in pairs until one is left for each segment; an unpaired one waits a round.
        while (count := transition.shape[3]) > 1:
            pairs = (x[:, :, :, : count // 2 * 2].unflatten(3, (-1, 2)).unbind(4) for x in (transition, added))
            (step, next_step), (add, next_add) = pairs
            step, add = next_step @ step, next_step @ add + next_add
            if count % 2:
                step, add = (torch.cat((x, of[:, :, :, -1:]), dim=3) for x, of in ((step, transition), (add, added)))
            transition, added = step, add
        return transition[:, :, :, 0] * decay, added[:, :, :, 0]

    def chunks(self, k: Tensor, v: Tensor, w: Tensor, first: tuple[int, ...]) -> list[Tensor]:
        """Cut [b, n, k, s, ...] into m chunks, [b, n, k, m, t, ...], normalise the keys, and move the dimensions
        `first` to the front."""
        size = k.shape[-2]
        each = min(WRITE_CHUNK, size)
        if missing := -size % each:  # filled up with tokens that write nothing: w = 0
            k, v, w = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing)), F.pad(w, (0, missing))
        k, v, w = (x.unflatten(3, (-1, each)).movedim(first, tuple(range(len(first)))) for x in (k, v, w))
        return [self.unit(k), v, w]

    def decay(self, w_bnks: Tensor) -> Tensor:
        """The factor of the memory at the start of each segment, [b, n, k]."""
        return torch.exp(-self.decay_rate().to(w_bnks.dtype) * w_bnks.sum(-1))

    # ---- accounting

    @classmethod
    def flops_per_token(cls, config: "InfiniConfig") -> float:
        heads, kv_heads, d = config.head_sizes
        chunk = config.segment_length / -(-config.segment_length // WRITE_CHUNK)
        # Read q M. Write: K K^T, the triangular system of d columns (half of a product), K M and X^T (V - K M).
        memory = 2 * heads * d * d + 2 * kv_heads * (chunk * d + chunk * d / 2 + 2 * d * d)
        return memory + 2 * config.hidden_size * (heads + kv_heads)  # gate and write strength
