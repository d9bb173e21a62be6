"""The interface of a memory rule, and the scans over segments that rules share.

Infini-attention (arXiv 2404.07143) gives every attention layer a compressive memory: a state of constant size that a
segment reads before it writes to it. A memory rule says what the state is, how it is read and how it is written.
Layers, lanes, cache, checkpoints and exports treat the state as opaque, and ask the rule for everything else that
depends on it: the learning-rate groups of its parameters, its FLOPs, what it warns of and what it logs. A rule is
therefore one file, plus two lines in rules.py and its name in configuration.py.

The memory before segment s depends on the layer's inputs only through sums (or small matrix recurrences) over
segments, so a rule handles all segments of a window at once; there is no loop over segments through the network. The
state is float32 (float64 for a float64 model) whatever the model's dtype: in bfloat16 a normaliser stops counting
after some hundred segments.

Shape suffixes: b batch, n segments, s positions in a segment, k key/value heads, g query heads per key/value head,
d key dim, e value dim; before rows are cut into segments, B rows, T new tokens, L tokens including cached ones,
D hidden size, C channels.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .writes import affine_steps

if TYPE_CHECKING:
    from .cache import InfiniCacheLayer
    from .configuration import InfiniConfig
    from .context import ContextGroup
    from .window import Window

# The state of a layer by name: its memory and whatever else is carried. Arguments named `memory` are such states.
MemoryState = dict[str, Tensor]


class RuleOutput(NamedTuple):
    """What `MemoryRule.read_and_write` returns.

    read: what every query read, [b, n, k, g, s, e], in the state's dtype.
    known: whether that read means anything, bool, broadcastable to `read`. With the paper's rules it is false until
        the token's document has written to the memory; there attention uses its local part alone.
    state: the state after the window (under context parallelism after this rank's segments), without what
        `local_queries_and_keys` has returned. No tensor of it may be a view of a larger one, because lanes and caches
        keep it.
    strengths: means over the call's tokens of the write strength that each asks for, from 0 to 1, and of its square,
        [2, b, k] (see `density`). Tokens count, too, that are not written because their document ends inside the
        segment. None outside of training, and for rules that do not choose what they write.
    """

    read: Tensor
    known: Tensor
    state: MemoryState
    strengths: Tensor | None = None


class Appended(NamedTuple):
    """What `MemoryRule.append` returns.

    key_query: key and queries that local attention takes, side by side and without RoPE, [B, 1, (k + heads) d].
    read: what each query read, [B, k, g, e], in the state's dtype.
    share: the memory's share of the mix, 0 where the read means nothing, broadcastable to `read`.
    """

    key_query: Tensor
    read: Tensor
    share: Tensor


class MemoryRule(nn.Module):
    """Base class of the memory rules; one instance per layer; its parameters are named `rule.*` in that layer.

    The defaults are those of a rule without parameters whose state is the matrix M alone. A subclass has to define
    `read_and_write` and `flops_per_token`.

    Attributes:
        memory_names: the entries of the state that are the memory, in contrast to what is carried of the last tokens.
        gate_parameters: names of the rule's parameters that train at `optimizer.gate_lr` without weight decay: those
            that, like the gate itself, have to move by several units.
        vector_parameters: names of parameters with two or more dimensions that are no matrices, and therefore have no
            weight decay. One-dimensional parameters never have any.
        undecayed_parameters: names of matrices that have no weight decay.
        trained_by_later_segments: a phrase for warnings, the rule's parameters that only the loss of later segments
            trains.
        trained_at_gate_lr: a phrase for warnings, the rule's parameters that do not change at `optimizer.gate_lr` 0.
        chooses_writes: whether the rule learns how strongly it writes each token (`RuleOutput.strengths`).
        as_on_gpu: compute on a CPU as on a GPU, for counting a GPU's memory where there is none.
    """

    memory_names: ClassVar[tuple[str, ...]] = ("M",)
    gate_parameters: ClassVar[tuple[str, ...]] = ()
    vector_parameters: ClassVar[tuple[str, ...]] = ()
    undecayed_parameters: ClassVar[tuple[str, ...]] = ()
    trained_by_later_segments: ClassVar[str] = ""
    trained_at_gate_lr: ClassVar[str] = "gates"
    chooses_writes: ClassVar[bool] = False
    as_on_gpu = False

    def __init__(self, config: "InfiniConfig"):
        super().__init__()
        heads, self.kv_heads, self.dim = config.head_sizes
        self.groups = heads // self.kv_heads

    def init_weights(self) -> None:
        """Give the rule's own parameters their initial values."""

    def keep_local_attention(self) -> None:
        """Called after `init_weights` when a pretrained decoder is imported: change the parameters so that its local
        attention is what it was."""

    @classmethod
    def init_state(cls, config: "InfiniConfig", batch: int, **factory) -> MemoryState:
        """The empty memory: all zero, batch first. By default M [batch, kv heads, d, d]."""
        _, kv_heads, dim = config.head_sizes
        return {"M": torch.zeros(batch, kv_heads, dim, dim, **factory)}

    def forward(self, method: str, *arguments: Any) -> Any:
        """Call a method by its name: one of the three steps of a call, `token_features`, `local_queries_and_keys` and
        `read_and_write`, or `append`.

        Attention calls a rule in this way only, because what libraries do to the parameters of a module, such as
        loading them from the disk (accelerate's offload) or adding an adapter (PEFT), they do around its forward.
        """
        return getattr(self, method)(*arguments)

    def token_features(self, x_BTD: Tensor, q_BTC: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the rule computes from single tokens, before they are cut into segments.

        Args:
            x_BTD: the layer's normalised input.
            q_BTC: its projected queries.

        Returns:
            the offset of each token's gate logit, [B, T, heads] (None: no offset); and what the rule needs of a token
            besides its key and value, each [B, T, any], by name. Generation caches these features beside the keys.
        """
        return None, {}

    def local_queries_and_keys(
        self, state: MemoryState, q_BTC: Tensor, k_BLC: Tensor, features: dict[str, Tensor], window: "Window"
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """The queries and keys that local attention and `read_and_write` take, and what that adds to the state.

        Args:
            state: the memory before the window.
            q_BTC: projected queries of the tokens that ask.
            k_BLC: projected keys; with `window.placement`, frames of cached and new tokens.
            features: as returned by `token_features`, for the tokens of k_BLC.
            window: the layout of the call.

        Returns:
            queries and keys, in the shapes given; and entries of the state after the window.
        """
        return q_BTC, k_BLC, {}

    def read_and_write(
        self,
        state: MemoryState,
        q_bnkgsd: Tensor,
        k_bnksd: Tensor,
        v_bnkse: Tensor,
        features: dict[str, Tensor],
        window: "Window",
    ) -> RuleOutput:
        """Read the memory for every query of a window, then return the state after it. Called without autocast.

        Args:
            state: the memory before the window.
            q_bnkgsd, k_bnksd, v_bnkse: queries, keys and values in segments, without RoPE, any float dtype. Keys and
                values may have no positions at all: during generation, nothing is written inside a segment.
            features: as in `local_queries_and_keys`, not cut into segments; `window.split` cuts them.
            window: the layout of the call. `window.access` is None where the whole window continues the document
                that the state describes; where `window.reads_memory` is false every token must find its memory empty;
                `window.context` is the group of ranks that share the window; its `carried` gives the state before
                this rank's segments.
        """
        raise NotImplementedError

    def append(
        self, x_B1D: Tensor, q_B1C: Tensor, k_B1C: Tensor, beta: Tensor, cached: "InfiniCacheLayer", window: "Window"
    ) -> Appended:
        """Take all three steps for a token that is appended to each row's segment, the usual call of generation.

        Nothing is written to the memory and no gradient is wanted. This default serves every rule. A rule that
        overrides it can keep in `cached.prepared` what is the same for all tokens of a segment, and must cache the
        same keys and features.

        Args:
            x_B1D, q_B1C, k_B1C: the layer's normalised input, its projected queries and keys.
            beta: logits of the gates, [heads].
            cached: the cache of this layer, to which key and features are appended in place.
            window: the layout of the call.
        """
        assert cached.memory is not None and window.placement is not None
        gate, features = self.token_features(x_B1D, q_B1C)
        widths = [part.shape[-1] for part in (k_B1C, *features.values())]
        packed = cached.append_key(torch.cat((k_B1C, *features.values()), dim=-1), window.placement)
        k_BLC, *parts = packed.all().split_with_sizes(widths, dim=-1)
        features = dict(zip(features, parts, strict=True))
        q, k_BLC, _ = self.local_queries_and_keys(cached.memory, q_B1C, k_BLC, features, window)
        k = k_BLC[:, -1:]
        with without_autocast(x_B1D):
            rows = q.reshape(len(q), 1, self.kv_heads, -1, 1, self.dim)
            nothing = k.reshape(len(k), 1, self.kv_heads, 1, self.dim)[:, :, :, :0]
            read, known, *_ = self.read_and_write(cached.memory, rows, nothing, nothing, features, window)
            share = torch.sigmoid((beta if gate is None else beta + gate[:, 0]).to(read.dtype))
            share = share.view(-1, 1, *rows.shape[2:5], 1) * known
        return Appended(torch.cat((k, q), dim=-1), read[:, 0, ..., 0, :], share[:, 0, ..., 0, :])

    @classmethod
    def flops_per_token(cls, config: "InfiniConfig") -> float:
        """Forward FLOPs of one token in one layer: the matrix products of the rule's reads, writes and
        projections."""
        raise NotImplementedError

    @classmethod
    def warnings(cls, *, segments_per_window: int, gate_lr: float, write_cost: float) -> list[str]:
        """What of the memory does not learn in a run with these options, one line each: never an error.

        Easy tasks may be learned all the same, with keys and values that local attention trains.
        """
        found = []
        cost = f"model.write_cost: found {write_cost:g}"
        if write_cost and not cls.chooses_writes:
            found.append(f"{cost}: it has no effect, because this memory rule writes all tokens alike")
            write_cost = 0.0
        if segments_per_window == 1:
            untrained = (
                f", and {cls.trained_by_later_segments} get none at all" if cls.trained_by_later_segments else ""
            )
            found.append(
                "data.segments_per_window: found 1: gradients end at the window's start, so none asks a segment to "
                f"write what a later one reads{untrained}; with 2 or more segments they do"
            )
            if write_cost:
                found.append(
                    f"{cost} with data.segments_per_window 1: write strengths learn from this cost alone, which asks "
                    "for few writes, and not for those that are read"
                )
        if gate_lr == 0:
            found.append(
                f"model.optimizer.gate_lr: found 0: {cls.trained_at_gate_lr} stay as they began; 0.01 trains them"
            )
            if write_cost:
                found.append(f"{cost} with model.optimizer.gate_lr 0: it has no effect")
        return found

    @classmethod
    def metrics(cls, states: list[MemoryState]) -> dict[str, float]:
        """Values to log of the lanes' memories, by name; one state of this rule [lanes, ...] per layer."""
        values = dict[str, float]()
        for name in states[0]:
            norm = torch.stack([state[name].flatten(1) for state in states]).norm(dim=-1)  # [layers, lanes]
            values |= {f"{name}_norm_mean": norm.mean().item(), f"{name}_norm_max": norm.max().item()}
        return values


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast is off on the device of x, because memories must stay in float32."""
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if autocast else nullcontext()


def density(strengths: Tensor) -> Tensor:
    """How densely memories were written: the mean write strength divided by the root mean square.

    It is 0 if nothing is written, and 1 if all tokens are written with the same strength. As a term of the loss it
    makes the memory select what it writes. It does not depend on the scale of the strengths, and neither does a
    normalised read; a cost of the mean strength would only scale all of them down.

    Args:
        strengths: as in RuleOutput, [..., 2, b, k].

    Returns:
        a scalar, the mean over rows, heads and leading dimensions.
    """
    mean, square = strengths.unbind(-3)
    return (mean * torch.rsqrt(square + 1e-6)).mean()


def scan(initial: Tensor, added_bn: Tensor, keep_bn: Tensor | None, context: "ContextGroup | None" = None) -> Tensor:
    """Running sums over segments: out[:, s] = initial + added[:, 0] + ... + added[:, s - 1] for s = 0 ... n.

    Args:
        initial: [b, ...], the sum before the window.
        added_bn: [b, n, ...].
        keep_bn: bool [b, n]; where it is false, the sum before segment s is dropped as segment s is added. None: all
            are kept.
        context: the ranks that share the window. The segments are then those of this rank, and so are the sums.

    Returns:
        [b, n + 1, ...].
    """
    if context is not None:
        own = scan(torch.zeros_like(initial), added_bn, keep_bn)[:, -1]
        initial = context.carried(initial, own, None if keep_bn is None else keep_bn.all(1))
    if keep_bn is None:
        return torch.cat((initial[:, None], added_bn), dim=1).cumsum(dim=1)
    # A masked step instead of a difference of cumulative sums: a subtraction would leave the rounding errors (or the
    # infinities) of one document in the memory of the next.
    sums = [initial]
    for s in range(added_bn.shape[1]):
        keep = keep_bn[:, s].view(-1, *[1] * (initial.dim() - 1))
        sums.append(torch.where(keep, sums[-1], 0) + added_bn[:, s])
    return torch.stack(sums, dim=1)


def affine_scan(
    initial: Tensor,
    transition_bn: Tensor,
    added_bn: Tensor,
    keep_bn: Tensor | None,
    context: "ContextGroup | None" = None,
) -> Tensor:
    """As `scan`, for steps M' = transition M + added on matrices.

    Args:
        initial: [b, k, d, e].
        transition_bn: [b, n, k, d, d].
        added_bn: [b, n, k, d, e].
        keep_bn, context: as in `scan`.

    Returns:
        [b, n + 1, k, d, e].
    """
    if context is not None:
        own_transition, own_added = _composed(transition_bn, added_bn, keep_bn)
        initial = context.carried(initial, own_added, None if keep_bn is None else keep_bn.all(1), own_transition)
    transition, added = (x.transpose(0, 1).flatten(1, 2) for x in (transition_bn, added_bn))
    drop = None
    if keep_bn is not None:
        drop = ~keep_bn.expand(len(initial), -1).T.repeat_interleave(initial.shape[1], dim=1)
    out = affine_steps(initial.flatten(0, 1), transition, added, drop)
    return out.unflatten(1, initial.shape[:2]).transpose(0, 1)


def _composed(transition_bn: Tensor, added_bn: Tensor, keep_bn: Tensor | None) -> tuple[Tensor, Tensor]:
    """All steps M' = transition M + added of this rank's segments as a single one.

    Args: as in `affine_scan`. Where keep_bn is false the memory before counts as 0; the first tensor returned then
        means nothing, and the caller drops what it multiplies.

    Returns:
        the composed transition [b, k, d, d] and added [b, k, d, e].
    """
    (transition, *steps), (added, *adds) = transition_bn.unbind(1), added_bn.unbind(1)
    for s, (step, add) in enumerate(zip(steps, adds, strict=True), start=1):
        old = added if keep_bn is None else torch.where(keep_bn[:, s, None, None, None], added, 0)
        transition, added = step @ transition, step @ old + add
    return transition, added
