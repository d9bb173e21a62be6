"""Elementwise pieces of the memory with backwards written by hand.

On long windows they are bound by passes over memory, not by arithmetic, and autograd's formulas take two to three
times as many passes. Each is compared with plain autograd in tests/numerics/test_fused.py.
"""

import torch
from torch import Tensor


class _UnitSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        y = torch.ops.aten.silu.out(x, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
        scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().add_(eps).rsqrt_()
        y.mul_(scale)
        ctx.save_for_backward(x, y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, y, scale = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True)
        grad = torch.addcmul(grad, y, along, value=-1).mul_(scale)
        return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=torch.empty_like(x)), None


def unit_silu(x: Tensor, eps: float = 1e-6) -> Tensor:
    """s / sqrt(|s|^2 + eps) over the last dimension, s = silu(x); contiguous whatever x is."""
    return _UnitSilu.apply(x, eps)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, before: Tensor, x: Tensor, weight: Tensor, reach: Tensor | None) -> Tensor:
        ctx.save_for_backward(before, x, weight, reach)
        out = x * weight[-1]
        for j, (tap, old) in _taps(before, x):
            out[:, j:].addcmul_(_masked(tap, reach, j), weight[-1 - j])
            out[:, : old.shape[1]].addcmul_(_masked(old, reach, j, old=True), weight[-1 - j])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        before, x, weight, reach = ctx.saved_tensors
        grad_x, grad_before = grad * weight[-1], torch.zeros_like(before)
        grad_weight = torch.empty_like(weight)
        grad_weight[-1] = (grad * x).sum((0, 1))
        for j, (tap, old) in _taps(before, x):
            late, early = _masked(grad[:, j:], reach, j), _masked(grad[:, : old.shape[1]], reach, j, old=True)
            grad_x[:, : tap.shape[1]].addcmul_(late, weight[-1 - j])
            first = before.shape[1] - j
            grad_before[:, first : first + old.shape[1]].addcmul_(early, weight[-1 - j])
            grad_weight[-1 - j] = (late * tap).sum((0, 1)) + (early * old).sum((0, 1))
        return grad_before, grad_x, grad_weight, None


def _taps(before: Tensor, x: Tensor):
    """For each j: the j-th last input of tokens from j on, which lies in x, and of those before, in `before`."""
    length, width = x.shape[1], before.shape[1]
    for j in range(1, width + 1):
        yield j, (x[:, : max(length - j, 0)], before[:, width - j :][:, : min(j, length)])


def _masked(x: Tensor, reach: Tensor | None, j: int, old: bool = False) -> Tensor:
    if reach is None:
        return x
    reach = reach[:, : x.shape[1]] if old else reach[:, j : j + x.shape[1]]
    return torch.where(reach[..., None] >= j, x, 0)


def convolve(before_BJC: Tensor, x_BTC: Tensor, weight_JC: Tensor, reach_BT: Tensor | None) -> Tensor:
    """Causal depthwise convolution of x behind its last inputs, whose last weight is that of the token itself.

    reach_BT: earlier tokens of the same document, counted up to the width less one, of each token (None: all).
    """
    return _Convolve.apply(before_BJC, x_BTC, weight_JC, reach_BT)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        y = x * scale
        product = grad * y
        grad_weight = product.flatten(0, -2).sum(0)
        along = (product @ weight).div_(x.shape[-1])[..., None]
        return (grad * weight).addcmul_(y, along, value=-1).mul_(scale), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm over the last dimension."""
    return _RmsNorm.apply(x, weight, eps)


class _DeltaMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        k_t = k.transpose(-1, -2)
        gram = k @ k_t
        # Solved from the right, Y lies in rows: Y^T (I + L) = K^T; L's diagonal counts as ones.
        y = _solve((gram * w[..., None]).tril_(-1), k_t, upper=False).transpose(-1, -2)
        x_t = (y * w[..., None]).transpose(-1, -2)
        ctx.save_for_backward(k, v, w, gram, y)
        return x_t @ k, x_t @ v

    @staticmethod
    def backward(ctx, grad_p: Tensor, grad_a: Tensor):
        k, v, w, gram, y = ctx.saved_tensors
        lower = (gram * w[..., None]).tril_(-1)
        x = y * w[..., None]
        grad_k, grad_v = x @ grad_p, x @ grad_a
        grad_x = (k @ grad_p.transpose(-1, -2)).add_(v @ grad_a.transpose(-1, -2))
        grad_w = (grad_x * y).sum(-1)
        # (I + L)^T Y = K: K's gradient B solves (I + L) B = Y's, and L's is -Y B^T.
        b_t = _solve(lower.transpose(-1, -2), grad_x.mul_(w[..., None]).transpose(-1, -2), upper=True)
        less = (y @ b_t).tril_(-1)  # minus the gradient of L
        grad_w -= torch.mul(less, gram, out=lower).sum(-1)
        less.mul_(w[..., None])
        grad_k.add_(b_t.transpose(-1, -2)).sub_((less + less.transpose(-1, -2)) @ k)
        return grad_k, grad_v, grad_w


def _solve(a: Tensor, b: Tensor, upper: bool) -> Tensor:
    return torch.linalg.solve_triangular(a, b, upper=upper, left=False, unitriangular=True)


def delta_maps(k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Writes M <- M + w_t k_t (v_t - k_t M)^T for t = 0, 1, ... as one step M' = M - P M + A.

    k [..., t, d], v [..., t, e], w [..., t]; returns P [..., d, d] and A [..., d, e]. With L = tril(w K K^T, -1) and
    X = w (I + L)^-T K, P = X^T K and A = X^T V.
    """
    return _DeltaMaps.apply(k, v, w)
