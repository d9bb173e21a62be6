"""Elementwise pieces of the memory with backwards written by hand.

On long windows they are bound by passes over memory, not by arithmetic, and autograd's formulas take two to three
times as many passes. Each is compared with plain autograd in tests/numerics/test_fused.py.
"""

import torch
from torch import Tensor

BLOCK = 8  # of the smallest triangular system


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


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + tril(lower, -1))^-1 of the last two dimensions, whose size is a power of two, at least BLOCK.

    Products of blocks alone: twice as fast on two threads as `solve_triangular`, which takes a batch's matrices one
    after the other, and the inverse serves forward and backward.
    """
    blocks = _diagonal_blocks(lower, BLOCK).tril(-1)
    identity = torch.eye(BLOCK, dtype=lower.dtype, device=lower.device)
    # (I + N)^-1 = (I - N) (I + N^2) (I + N^4), as N^8 = 0. Powers of larger blocks could be so large that float32
    # loses the inverse, which is small.
    square = blocks @ blocks
    inverse = (identity - blocks) @ (identity + square) @ (identity + square @ square)
    while (size := inverse.shape[-1]) < lower.shape[-1]:
        first, second = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        corner = _diagonal_blocks(lower, 2 * size)[..., size:, :size]
        inverse = lower.new_zeros(*first.shape[:-2], 2 * size, 2 * size)
        inverse[..., :size, :size] = first
        inverse[..., size:, size:] = second
        inverse[..., size:, :size] = (second @ corner @ first).neg_()
    return inverse.squeeze(-3)


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """[..., c, c] -> its blocks of size x size on the diagonal, [..., c / size, size, size]."""
    rows = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return rows.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


class _DeltaWrites(torch.autograd.Function):
    """With L = tril(w K K^T, -1) and X = w (I + L)^-T K of a chunk, M' = M + X^T (V - K M)."""

    @staticmethod
    def forward(ctx, memory: Tensor, fade: Tensor, drop: Tensor | None, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        (n, m, *batch, t, d), e = k.shape, v.shape[-1]
        ctx.shapes = memory.shape, fade.shape, None, k.shape, v.shape, w.shape
        k, w, fade = k.reshape(n, m, -1, t, d), w.reshape(n, m, -1, t), fade.reshape(n, -1, 1, 1)
        u = torch.empty_like(v, memory_format=torch.contiguous_format).copy_(v).view(n, m, -1, t, e)
        gram = k @ k.mT
        inverse = unit_lower_inverse(gram * w[..., None])
        y = inverse.mT @ k
        x = y * w[..., None]
        before = memory.new_empty(n + 1, fade.shape[1], d, e)
        within = memory.new_empty(n, m, fade.shape[1], d, e)  # before each chunk
        before[0] = memory.reshape(-1, d, e)
        befores = before.unbind(0)
        for s, (olds, *chunks) in enumerate(_each(within, k, x.mT, u)):
            torch.mul(befores[s], fade[s], out=olds[0])
            if drop is not None:
                olds[0].masked_fill_(drop[s].reshape(-1, 1, 1), 0)
            for old, k_i, x_i, u_i, new in zip(olds, *chunks, (*olds[1:], befores[s + 1]), strict=True):
                torch.baddbmm(u_i, k_i, old, alpha=-1, out=u_i)  # V - K M
                torch.baddbmm(old, x_i, u_i, out=new)
        ctx.save_for_backward(fade, k, w, gram, inverse, y, x, u, within, before)
        return before.view(n + 1, *batch, d, e)

    @staticmethod
    def backward(ctx, grad: Tensor):
        fade, k, w, gram, inverse, y, x, u, within, before = ctx.saved_tensors
        grad = grad.reshape(before.shape)
        grad_u, grad_after, grad_fade = torch.empty_like(u), torch.empty_like(within), torch.empty_like(fade)
        grad_after[-1, -1] = grad[-1]
        grad_within, grad_memory = torch.empty_like(before[0]), torch.empty_like(before[0])
        segments = _each(grad_after, k.mT, x, grad_u)
        for s in range(len(segments) - 1, -1, -1):
            news, *chunks = segments[s]
            olds = grad_within, *news[:-1]
            for new, k_i, x_i, u_i, old in reversed(list(zip(news, *chunks, olds, strict=True))):
                torch.bmm(x_i, new, out=u_i)
                torch.baddbmm(new, k_i, u_i, alpha=-1, out=old)
            torch.sum(grad_within * before[s], (-2, -1), keepdim=True, out=grad_fade[s])
            torch.addcmul(grad[s], grad_within, fade[s], out=grad_after[s - 1, -1] if s else grad_memory)

        grad_x = u @ grad_after.mT
        grad_w = (grad_x * y).sum(-1)
        # (I + L)^T Y = K: K's gradient B solves (I + L) B = Y's, and L's is -Y B^T.
        b = inverse @ grad_x.mul_(w[..., None])
        less = (y @ b.mT).tril_(-1)  # minus the gradient of L
        grad_w -= (less * gram).sum(-1)
        less.mul_(w[..., None])
        grad_k = b.sub_(grad_u @ within.mT).sub_((less + less.mT) @ k)
        grads = grad_memory, grad_fade, None, grad_k, grad_u, grad_w
        return tuple(x if x is None else x.view(of) for x, of in zip(grads, ctx.shapes, strict=True))


def _each(*tensors: Tensor) -> list[tuple[tuple[Tensor, ...], ...]]:
    """Of each segment, of each tensor [n, m, ...]: its chunks."""
    n, m = tensors[0].shape[:2]
    flat = [x.flatten(0, 1).unbind(0) for x in tensors]
    return [tuple(chunks[s * m : (s + 1) * m] for chunks in flat) for s in range(n)]


def delta_writes(memory: Tensor, fade: Tensor, drop: Tensor | None, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """M <- fade M at the start of a segment, then M <- M + w_t k_t (v_t - k_t M)^T for each of its tokens.

    Args:
        memory: [..., d, e].
        fade: [n, ...] of each segment; 0 where drop, [n, ...] bool, says so, however large M is.
        k, v, w: [n, m, ..., t, d], [n, m, ..., t, e], [n, m, ..., t]: m chunks a segment, of t tokens, a power of two
            and at least BLOCK.

    Returns:
        [n + 1, ..., d, e]: the memory before each segment and after the last.
    """
    return _DeltaWrites.apply(memory, fade, drop, k, v, w)
