"""The two memory rules of the Infini-attention paper (arXiv 2404.07143, section 2.1.2).

With sigma(x) = ELU(x) + 1, queries Q and keys K without RoPE, and the state (M, z) before a segment:

    read           A_mem = sigma(Q) M / (sigma(Q) z)
    paper-linear   M' = M + sigma(K)^T V
    paper-delta    M' = M + sigma(K)^T (V - sigma(K) M / (sigma(K) z))
    both           z' = z + sum_t sigma(K_t)

naive.py has the same as a loop. Shape suffixes are those of memory_rule.py.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import Fused
from .memory_rule import (
    Appended,
    MemoryRule,
    MemoryState,
    RuleOutput,
    affine_scan,
    scan,
    without_autocast,
)

if TYPE_CHECKING:
    from .configuration import InfiniConfig
    from .context import ContextGroup
    from .window import Window

# A normaliser below this counts as this. sigma(q) z underflows only where every feature of q is below about -27, and
# the quotient must stay finite there. It is far below any normaliser seen in practice, so it biases nothing.
EPS = 1e-12


class _EluPlusOne(Fused):
    """ELU + 1 whose backward uses the output, which the products keep anyway, instead of a second exponential."""

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
    """The feature map ELU + 1 of the paper."""
    return _EluPlusOne.of(x)


class PaperLinear(MemoryRule):
    """The linear update: M' = M + sigma(K)^T V. State: M [b, k, d, e] and z [b, k, d]."""

    memory_names: ClassVar = ("M", "z")

    @classmethod
    def init_state(cls, config: "InfiniConfig", batch: int, **factory) -> MemoryState:
        state = super().init_state(config, batch, **factory)
        return state | {"z": torch.zeros_like(state["M"][..., 0])}

    def read_and_write(self, state, q_bnkgsd, k_bnksd, v_bnkse, features, window: "Window") -> RuleOutput:
        dtype, access = state["M"].dtype, window.access
        m_before, z_before, after = state["M"][:, None], state["z"][:, None], state
        if k_bnksd.shape[-2]:
            k, v, keep_bn = sigma(k_bnksd.to(dtype)), v_bnkse.to(dtype), None
            if access is not None:
                k = k * access.write_bns[:, :, None, :, None]
                keep_bn = access.keep_bn
            # The states before each segment: of z first, which the delta rule's writes need.
            z_bnkd = scan(state["z"], k.sum(dim=-2), keep_bn, window.context)
            m_bnkde = self.write(state["M"], z_bnkd[:, :-1], k, v, keep_bn, window.context)
            m_before, z_before = m_bnkde[:, :-1], z_bnkd[:, :-1]
            # A view would keep the states before all segments alive.
            after = {"M": m_bnkde[:, -1].clone(), "z": z_bnkd[:, -1].clone()}

        # The query heads of one key/value head are rows of one product. The product with a small reciprocal replaces
        # a division, whose backward takes two more passes over all of `read` (2.06 against 1.82 ms for these lines,
        # forward and backward, at 8 segments of 256 and 4 heads of 64).
        q = sigma(q_bnkgsd.to(dtype))
        # bmm instead of @, which takes twice the time of a single token's products.
        rows = q.reshape(-1, q.shape[3] * q.shape[4], q.shape[5])  # [b*n*k, g*s, d]
        m, z = m_before.reshape(-1, *m_before.shape[3:]), z_before.reshape(-1, z_before.shape[3], 1)
        read = rows.bmm(m) * rows.bmm(z).clamp_min(EPS).reciprocal()
        known = (z_before.sum(-1) > 0).view(*z_before.shape[:3], 1, 1, 1)
        if not window.reads_memory:
            known = torch.zeros_like(known)
        if access is not None:
            known = known & access.read_bns[:, :, None, None, :, None]
        return RuleOutput(read.view(*q.shape[:5], -1), known, after)

    def append(self, x_B1D, q_B1C, k_B1C, beta, cached, window: "Window") -> Appended:
        assert cached.memory is not None and window.placement is not None
        cached.append_key(k_B1C, window.placement)
        if cached.prepared is None:
            m, z = cached.memory["M"], cached.memory["z"][..., None]
            share = torch.sigmoid(beta.to(m.dtype)).view(self.kv_heads, self.groups, 1)
            known = z.sum(-2, keepdim=True) > 0
            # Side by side, so that one product reads both.
            cached.prepared = {"m_z": torch.cat((m, z), dim=-1).flatten(0, 1), "share": share * known}
        with without_autocast(x_B1D):
            m_z = cached.prepared["m_z"]
            rows = sigma(q_B1C.to(m_z.dtype).view(-1, self.groups, self.dim))
            found, norm = rows.bmm(m_z).split_with_sizes((self.dim, 1), dim=-1)
            read = (found / norm.clamp_min(EPS)).view(-1, self.kv_heads, self.groups, self.dim)
        return Appended(torch.cat((k_B1C, q_B1C), dim=-1), read, cached.prepared["share"])

    def write(
        self,
        m_bkde: Tensor,
        z_bnkd: Tensor,
        k: Tensor,
        v: Tensor,
        keep_bn: Tensor | None,
        context: "ContextGroup | None",
    ) -> Tensor:
        """The memories before each segment and after the last one of this rank, [b, n + 1, k, d, e]; k is sigma(K),
        and 0 for tokens that are not written."""
        return scan(m_bkde, k.transpose(-1, -2) @ v, keep_bn, context)

    @classmethod
    def flops_per_token(cls, config: "InfiniConfig") -> float:
        heads, kv_heads, d = config.head_sizes
        return 2 * heads * (d * d + d) + 2 * kv_heads * d * d  # sigma(Q) M and sigma(Q) z; sigma(K)^T V

    @classmethod
    def metrics(cls, states: list[MemoryState]) -> dict[str, float]:
        """Also the smallest normaliser: reads divide by it."""
        return super().metrics(states) | {"z_min": min(state["z"].min().item() for state in states)}


class PaperDelta(PaperLinear):
    """The delta update, which writes only what the memory does not return for a key already.

    With D = diag(1 / (sigma(K) z)) and A = sigma(K)^T D sigma(K), the update is M' = (I - A) M + sigma(K)^T V.
    Neither A nor sigma(K)^T V depends on M, so both are formed for all segments at once, and n small steps on d x d
    matrices remain.
    """

    def write(self, m_bkde, z_bnkd, k, v, keep_bn, context):
        k_t = k.transpose(-1, -2)
        added = k_t @ v
        norm = k @ z_bnkd[..., None]  # [b, n, k, s, 1]
        # An empty memory holds nothing to replace: its A is 0, not 0/0.
        a = k_t @ torch.where(norm > 0, k / norm.clamp_min(EPS), 0)
        transition = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - a
        return affine_scan(m_bkde, transition, added, keep_bn, context)

    @classmethod
    def flops_per_token(cls, config: "InfiniConfig") -> float:
        _, heads, d = config.head_sizes
        # Also sigma(K) z, A, and A M once a segment.
        return super().flops_per_token(config) + 2 * heads * (d + d * d + d**3 / config.segment_length)
