"""The memory rules as plain loops, to read and to test against: one head of one document, segment after segment.

q, k, v: [segments, positions, d], without RoPE. Each function returns what every token reads, [segments, positions,
d]; the read of the first segment, whose memory is empty, is NaN under the paper's rules.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def paper_rule(q: Tensor, k: Tensor, v: Tensor, delta: bool) -> Tensor:
    """paper-linear and, if `delta`, paper-delta (arXiv 2404.07143, section 2.1.2)."""
    m, z = torch.zeros(k.shape[-1], v.shape[-1], dtype=v.dtype), torch.zeros(k.shape[-1], dtype=v.dtype)
    reads = []
    for q_s, k_s, v_s in zip(F.elu(q) + 1, F.elu(k) + 1, v, strict=True):
        reads.append((q_s @ m) / (q_s @ z)[:, None])
        stored = (k_s @ m) / (k_s @ z)[:, None] if delta and z.any() else 0
        m, z = m + k_s.T @ (v_s - stored), z + k_s.sum(0)
    return torch.stack(reads)


def selective_delta(q: Tensor, k: Tensor, v: Tensor, w: Tensor, c: Tensor, base: Tensor, norm: Tensor) -> Tensor:
    """selective-delta behind its convolution; w: write strengths [segments, positions], c: rate of forgetting,
    base: B [d, d], norm: weight of the read's RMS norm [d]."""

    def unit(x: Tensor) -> Tensor:
        return F.silu(x) / (F.silu(x).square().sum(-1, keepdim=True) + 1e-6).sqrt()

    m = torch.zeros_like(base)
    reads = []
    for q_s, k_s, v_s, w_s in zip(unit(q), unit(k), v, w, strict=True):
        reads.append(F.rms_norm(q_s @ (m + base), norm.shape, norm, 1e-6))
        m = m * torch.exp(-c * w_s.sum())
        for k_t, v_t, w_t in zip(k_s, v_s, w_s, strict=True):
            m = m + w_t * torch.outer(k_t, v_t - k_t @ m)
    return torch.stack(reads)
