"""The compressive memory of Infini-attention (arXiv 2404.07143, section 2.1.2), all segments of a window at once.

The memory before segment s depends on the layer's inputs only through sums over segments, so nothing here loops
over segments through the network; only the delta rule takes n small steps on d x d matrices. Everything runs in
float32 (float64 for a float64 model) whatever the model's dtype: in bfloat16 z stops counting after some hundred
segments.

A rule is a `MemoryRule`, with a state of named float32 tensors, batch first. Layers, lanes, cache, checkpoints and
export treat that state as opaque. The rules of the paper are here; rules.py names them all.

Shape suffixes: b batch, n segments, s positions in a segment, k key/value heads, g query heads per key/value head,
d key dim, e value dim; in rows that are not cut yet B rows, T new tokens, L tokens, D the model's width, C channels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .writes import affine_steps

if TYPE_CHECKING:
    from .attention import Window
    from .configuration import InfiniConfig
    from .context import ContextGroup

MemoryState = dict[str, Tensor]

# Below this a normaliser counts as this: sigma(q) z underflows only where every feature of q is under about -27,
# and there the quotient must stay finite. It is far below any normaliser seen in practice, so it biases nothing.
EPS = 1e-12


@dataclass(frozen=True)
class Access:
    """Which tokens of a window may read, which are written and which memories live on (DESIGN section 3.3).

    read_bns: token may read the memory before its segment: both belong to the same document.
    write_bns: token belongs to the last document of its segment, whose memory is the one to carry.
    keep_bn: the memory before the segment describes that same document, so it is added to, not dropped.

    bool; b and s may be 1 where rows or positions are alike.
    """

    read_bns: Tensor
    write_bns: Tensor
    keep_bn: Tensor

    @classmethod
    def of_documents(cls, documents_bns: Tensor) -> "Access":
        """From the document number of each token, counted from 0 = the document of the carried memory."""
        last_bn = documents_bns[:, :, -1]
        before_bn = F.pad(last_bn[:, :-1], (1, 0))
        return cls(
            read_bns=documents_bns == before_bn[..., None],
            write_bns=documents_bns == last_bn[..., None],
            keep_bn=last_bn == before_bn,
        )

    @classmethod
    def whole_segments(cls, whole_b: Tensor, segments: int) -> "Access":
        """One document a row, of which only the first whole_b segments are written."""
        yes = torch.ones(1, segments, 1, dtype=torch.bool, device=whole_b.device)
        write = torch.arange(segments, device=whole_b.device) < whole_b[:, None]
        return cls(read_bns=yes, write_bns=write[..., None], keep_bn=yes[..., 0])


class _EluPlusOne(torch.autograd.Function):
    """ELU + 1 that keeps its output for backward, which the products keep anyway, and takes no second exp."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = F.elu(x).add_(1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * y.clamp_max(1)  # 1 where x > 0, exp(x) = y elsewhere


def sigma(x: Tensor) -> Tensor:
    """Feature map ELU + 1 (paper, section 2.1.2)."""
    return _EluPlusOne.apply(x)


def scan(initial: Tensor, added_bn: Tensor, keep_bn: Tensor | None) -> Tensor:
    """Running sums over segments: out[:, s] = initial + added[:, 0] + ... + added[:, s - 1], for s = 0 ... n.

    initial: [b, ...]; added_bn: [b, n, ...]; returns [b, n + 1, ...]. Where keep_bn is false, what was summed
    before segment s is dropped as segment s is added.
    """
    if keep_bn is None:
        return torch.cat((initial[:, None], added_bn), dim=1).cumsum(dim=1)
    # A masked step, not a difference of cumulative sums: a subtraction would leave the rounding errors (or the
    # infinities) of one document in the memory of the next.
    sums = [initial]
    for s in range(added_bn.shape[1]):
        keep = keep_bn[:, s].view(-1, *[1] * (initial.dim() - 1))
        sums.append(torch.where(keep, sums[-1], 0) + added_bn[:, s])
    return torch.stack(sums, dim=1)


def stepped(initial: Tensor, kept_bn: Tensor, added_bn: Tensor, keep_bn: Tensor | None) -> Tensor:
    """As `scan`, of steps M' = kept M + added: initial [b, k, d, e], kept [b, n, k, d, d], added [b, n, k, d, e]."""
    kept, added = (x.transpose(0, 1).flatten(1, 2) for x in (kept_bn, added_bn))
    drop = None
    if keep_bn is not None:
        drop = ~keep_bn.expand(len(initial), -1).T.repeat_interleave(initial.shape[1], dim=1)
    out = affine_steps(initial.flatten(0, 1), kept, added, drop)
    return out.unflatten(1, initial.shape[:2]).transpose(0, 1)


def composed(kept_bn: Tensor, added_bn: Tensor, keep_bn: Tensor | None) -> tuple[Tensor, Tensor]:
    """Steps M' = kept M + added of all segments [b, n, k, d, d] as one; where keep_bn is false, M counts as 0 (its
    share of the first result then means nothing)."""
    (kept, *steps), (added, *adds) = kept_bn.unbind(1), added_bn.unbind(1)
    for s, (keep, add) in enumerate(zip(steps, adds, strict=True), start=1):
        old = added if keep_bn is None else torch.where(keep_bn[:, s, None, None, None], added, 0)
        kept, added = keep @ kept, keep @ old + add
    return kept, added


class MemoryRule(nn.Module):
    """What attention knows of a memory rule, one a layer; its parameters are the layer's `rule.*`.

    The defaults are those of a rule with nothing to learn whose state is M alone, which attends by q, k and v.
    """

    as_on_gpu = False  # true: on a CPU, too, it computes as on a GPU, where memory is counted (training/footprint.py)

    def __init__(self, config: "InfiniConfig"):
        super().__init__()

    def init_weights(self) -> None:
        """Give the rule's own parameters their initial values."""

    def leave_local_attention(self) -> None:
        """After `init_weights`, in a pretrained decoder: let local attention see its queries and keys as they are."""

    @classmethod
    def init_state(cls, config: "InfiniConfig", batch: int, **factory) -> MemoryState:
        """The empty memory: M [batch, kv heads, d, d], all zero, and what else the rule carries."""
        heads, dim = config.num_key_value_heads, config.head_dim
        assert heads and dim  # LlamaConfig fills them in
        return {"M": torch.zeros(batch, heads, dim, dim, **factory)}

    def of_tokens(self, x_BTD: Tensor, q_BTC: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """From the layer's input and queries: what to add to the gate's beta [B, T, heads] (None: nothing), and what
        else than its key and value the rule needs of a token, each [B, T, .]: the cache keeps it beside the key."""
        return None, []

    def queries_and_keys(
        self, state: MemoryState, q_BTC: Tensor, tokens: tuple[Tensor, ...], window: "Window"
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """What local attention and the memory take for queries and keys, here the projections as they are; and what
        that leaves in the state after the window.

        Args: as of `read_and_write`; q_BTC of the tokens that ask, in the place of which the result stands.
        """
        return q_BTC, tokens[0], {}

    def read_and_write(
        self,
        state: MemoryState,
        q_bnkgsd: Tensor,
        k_bnksd: Tensor,
        v_bnkse: Tensor,
        tokens: tuple[Tensor, ...],
        window: "Window",
    ) -> tuple[Tensor, Tensor, MemoryState, Tensor | None]:
        """Read for every query of a window, then the state after it; called without autocast.

        Args:
            state: memory before the window.
            q_bnkgsd, k_bnksd: of `queries_and_keys`, v_bnkse: the projection, all without RoPE, any float dtype. Keys
                and values may be fewer than queries: none at all where nothing is to be written yet (generation
                within a segment).
            tokens: projected keys, values and `of_tokens`' list, each [B, L, .]; with `window.placement`, frames of
                cached tokens and new ones.
            window: `access`, None where the whole window continues the carried document; `read`, False where every
                token shall find its memory empty; `split`, which cuts rows; `context`, the ranks that share it.

        Returns:
            read [b, n, k, g, s, e] in the state's dtype; `known` [b or 1, n or 1, k or 1, 1, s or 1, 1] bool, whether
            that read means anything (in the paper's rules: the token's document has written to the memory); the state
            after the window, without what `queries_and_keys` has left, no view of anything larger, as lanes keep it;
            in training, if the rule chooses what to write, how densely it wrote [b, k], 0 to 1.
        """
        raise NotImplementedError


class PaperLinear(MemoryRule):
    """M' = M + sigma(K)^T V, z' = z + sum_t sigma(K_t); read sigma(Q) M / (sigma(Q) z) (paper, eq. 3 to 5)."""

    @classmethod
    def init_state(cls, config: "InfiniConfig", batch: int, **factory) -> MemoryState:
        """M, and z [batch, kv heads, d]."""
        state = super().init_state(config, batch, **factory)
        return state | {"z": torch.zeros_like(state["M"][..., 0])}

    def read_and_write(self, state, q_bnkgsd, k_bnksd, v_bnkse, tokens, window):
        read, known, after = self.attend(state, q_bnkgsd, k_bnksd, v_bnkse, window.access, window.context)
        return read, known & window.read, after, None

    def attend(
        self,
        state: MemoryState,
        q_bnkgsd: Tensor,
        k_bnksd: Tensor,
        v_bnkse: Tensor,
        access: Access | None,
        context: "ContextGroup | None" = None,
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """Read for every token, then write; as MemoryRule.read_and_write."""
        dtype = state["M"].dtype
        q, k, v = sigma(q_bnkgsd.to(dtype)), sigma(k_bnksd.to(dtype)), v_bnkse.to(dtype)
        keep_bn = None
        if access is not None:
            k = k * access.write_bns[:, :, None, :, None]
            keep_bn = access.keep_bn
        z_bnkd, z = self.scan(state["z"], k.sum(dim=-2), keep_bn, context)
        m_bnkde, m = self.write(state["M"], z_bnkd[:, :-1], k, v, keep_bn, context)
        before, z_before = m_bnkde[:, :-1], z_bnkd[:, :-1]

        # Query heads of one key/value head are rows of one product.
        rows = q.flatten(3, 4)  # [b, n, k, g*s, d]
        # Times a small reciprocal: dividing takes two more passes over all of `read` in backward (2.06 against
        # 1.82 ms for these lines, forward and backward, at 8 segments of 256, 4 heads of 64).
        read = (rows @ before) * (rows @ z_before[..., None]).clamp_min(EPS).reciprocal()
        known = (z_before.sum(-1) > 0)[:, :, :, None, None, None]
        if access is not None:
            known = known & access.read_bns[:, :, None, None, :, None]
        return read.unflatten(3, q.shape[3:5]), known, {"M": m, "z": z}

    @staticmethod
    def scan(
        initial: Tensor, added_bn: Tensor, keep_bn: Tensor | None, context: "ContextGroup | None"
    ) -> tuple[Tensor, Tensor]:
        """`scan` from what the window's earlier ranks have left; and the last state of the window."""
        if context is None:
            sums = scan(initial, added_bn, keep_bn)
            return sums, sums[:, -1].clone()  # lanes and caches keep it: a view would keep all segments'
        own = scan(torch.zeros_like(initial), added_bn, keep_bn)[:, -1]
        first, last = context.carried(initial, own, None if keep_bn is None else keep_bn.all(1))
        return scan(first, added_bn, keep_bn), last

    def write(
        self,
        m_bkde: Tensor,
        z_bnkd: Tensor,
        k: Tensor,
        v: Tensor,
        keep_bn: Tensor | None,
        context: "ContextGroup | None",
    ) -> tuple[Tensor, Tensor]:
        """Memories before each segment and after the last, [b, n + 1, k, d, e], and after the window; k is sigma(K),
        0 if not written."""
        return self.scan(m_bkde, k.transpose(-1, -2) @ v, keep_bn, context)


class PaperDelta(PaperLinear):
    """M' = M + sigma(K)^T (V - sigma(K) M / (sigma(K) z)): only what the memory lacks is written (paper, eq. 6).

    With D = diag(1 / (sigma(K) z)) and A = sigma(K)^T D sigma(K) the step is M' = (I - A) M + sigma(K)^T V; A and
    the sum do not depend on M, so both are formed for all segments at once.
    """

    def write(self, m_bkde, z_bnkd, k, v, keep_bn, context):
        k_t = k.transpose(-1, -2)
        added = k_t @ v
        norm = k @ z_bnkd[..., None]  # [b, n, k, s, 1]
        # An empty memory holds nothing to replace: its A is 0, not 0/0.
        a = k_t @ torch.where(norm > 0, k / norm.clamp_min(EPS), 0)
        kept = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - a
        last = None
        if context is not None:
            keep, own = composed(kept, added, keep_bn)
            m_bkde, last = context.carried(m_bkde, own, None if keep_bn is None else keep_bn.all(1), keep)
        memories = stepped(m_bkde, kept, added, keep_bn)
        return memories, memories[:, -1].clone() if last is None else last
