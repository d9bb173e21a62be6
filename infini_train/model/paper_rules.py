"""The two memory rules of the Infini-attention paper (arXiv 2404.07143, section 2.1.2).

Shape suffixes as in memory_rule.py.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory_rule import MemoryRule, MemoryState, composed, scan, stepped
from .window import Access

if TYPE_CHECKING:
    from .configuration import InfiniConfig
    from .context import ContextGroup

# Below this a normaliser counts as this: sigma(q) z underflows only where every feature of q is under about -27,
# and there the quotient must stay finite. It is far below any normaliser seen in practice, so it biases nothing.
EPS = 1e-12


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
