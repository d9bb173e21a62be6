"""Elementwise pieces of the decoder and its memory, and the memory's writes, with backwards written by hand.

On long windows the former are bound by passes over memory, not by arithmetic, and autograd's formulas take two to
four times as many passes. Each is compared with plain autograd in tests/numerics/test_fused.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import solve_triangular


class _UnitSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        x = x.contiguous()  # of two layouts torch's loops take four times as long
        y = torch.nn.functional.silu(x)
        scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().add_(eps).rsqrt_()
        y.mul_(scale)
        ctx.save_for_backward(x, y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, y, scale = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True)
        grad = torch.addcmul(grad, y, along, value=-1).mul_(scale)
        return torch.ops.aten.silu_backward(grad, x), None


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
    if torch.compiler.is_compiling():  # which makes one pass of it, and of its backward
        return _convolved(before_BJC, x_BTC, weight_JC, reach_BT)
    return _Convolve.apply(before_BJC, x_BTC, weight_JC, reach_BT)


def _convolved(before: Tensor, x: Tensor, weight: Tensor, reach: Tensor | None) -> Tensor:
    width, length = before.shape[1], x.shape[1]
    padded, out = torch.cat((before, x), dim=1), x * weight[-1]
    for j in range(1, width + 1):
        tap = padded[:, width - j :][:, :length]
        out = out + _masked(tap, reach, j, old=True) * weight[-1 - j]
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        product = grad * x
        grad_weight = scale.flatten() @ product.flatten(0, -2)
        along = (product @ weight)[..., None].mul_(scale.pow(3).div_(x.shape[-1]))
        return (grad * weight).mul_(scale).addcmul_(x, along, value=-1), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm over the last dimension."""
    return _RmsNorm.apply(x, weight, eps)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1).to(ctx.dtype), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    (low, high), half = x.chunk(2, dim=-1), x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(high, sin[..., :half], value=-sign)
    out[..., half:].addcmul_(low, sin[..., half:], value=sign)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as Llama applies it, whose halves of `cos` and `sin` are alike; x [..., d] in any float dtype."""
    return _Rotate.apply(x, cos, sin)


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
        ctx.save_for_backward(fade, k, w, gram, inverse, y, u, within, before)
        return before.view(n + 1, *batch, d, e)

    @staticmethod
    def backward(ctx, grad: Tensor):
        fade, k, w, gram, inverse, y, u, within, before = ctx.saved_tensors
        x = y * w[..., None]
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


class _Solution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lower: Tensor, k: Tensor) -> Tensor:
        inverse = unit_lower_inverse(lower)
        y = inverse.mT @ k
        ctx.save_for_backward(inverse, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        inverse, y = ctx.saved_tensors
        b = inverse @ grad
        return (y @ b.mT).tril_(-1).neg_(), b


# Small steps, with little to fuse; in one graph with the rest of a layer torch 2.11 could not compile windows with
# documents that begin inside.
@torch.compiler.disable
def solution(lower: Tensor, k: Tensor) -> Tensor:
    """Y [..., t, d] of (I + tril(lower, -1))^T Y = k; lower [..., t, t]."""
    return _Solution.apply(lower, k)


class _AffineSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, memory: Tensor, kept: Tensor, added: Tensor, drop: Tensor | None) -> Tensor:
        if drop is not None:
            drop = drop[..., None, None]
            kept = kept.masked_fill(drop, 0)
        out = memory.new_empty(len(kept) + 1, *memory.shape)
        out[0] = memory
        states = out.unbind(0)
        for s, (keep, add) in enumerate(zip(kept.unbind(0), added.unbind(0), strict=True)):
            old = states[s] if drop is None else states[s].masked_fill(drop[s], 0)  # it may be infinite
            torch.baddbmm(add, keep, old, out=states[s + 1])
        ctx.save_for_backward(out, kept, drop)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        out, kept, drop = ctx.saved_tensors
        grad = grad.clone()  # of each state, in the end with all that follows from it
        grads = grad.unbind(0)
        for keep, before, after in zip(kept.mT.unbind(0)[::-1], grads[-2::-1], grads[:0:-1], strict=True):
            torch.baddbmm(before, keep, after, out=before)
        grad_kept = grad[1:] @ out[:-1].mT
        if drop is not None:
            grad_kept.masked_fill_(drop, 0)
        return grad[0], grad_kept, grad[1:], None


def affine_steps(memory: Tensor, kept: Tensor, added: Tensor, drop: Tensor | None) -> Tensor:
    """M <- kept M + added, step after step, where `drop` says so of an M that counts as 0, however large it is.

    Args:
        memory: [m, d, e].
        kept, added: [n, m, d, d], [n, m, d, e].
        drop: [n, m] bool; None: nothing is dropped.

    Returns:
        [n + 1, m, d, e]: the memory before each step and after the last.
    """
    if not torch.compiler.is_compiling():
        return _AffineSteps.apply(memory, kept, added, drop)
    memories = [memory]
    for s, (keep, add) in enumerate(zip(kept.unbind(0), added.unbind(0), strict=True)):
        old = memories[-1] if drop is None else torch.where(drop[s, :, None, None], 0, memories[-1])
        memories.append(keep @ old + add)
    return torch.stack(memories)


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + tril(lower, -1))^-1 of the last two dimensions.

    On a CPU torch's solver takes a batch's matrices one after the other, on one thread: here only the diagonal's
    small blocks, and products do the rest.
    """
    size = lower.shape[-1]
    while size > 16 and size % 2 == 0:
        size //= 2
    identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
    # Stacks of blocks. A solution comes in columns, so that of the transposed system in rows.
    inverse = solve_triangular(_diagonal_blocks(lower, size).mT, identity, upper=True, unitriangular=True).mT
    while size < lower.shape[-1]:
        first, second = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        corner = (second @ _diagonal_blocks(lower, 2 * size)[..., size:, :size] @ first).neg_()
        inverse = torch.cat((F.pad(first, (0, size)), torch.cat((corner, second), dim=-1)), dim=-2)
        size *= 2
    return inverse.squeeze(-3)


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """[..., t, t] -> [..., t / size, size, size]."""
    count = x.shape[-1] // size
    blocks = x.unflatten(-1, (count, size)).unflatten(-3, (count, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _each(*tensors: Tensor) -> list[tuple[tuple[Tensor, ...], ...]]:
    """Of each segment, of each tensor [n, m, ...]: its chunks."""
    n, m = tensors[0].shape[:2]
    flat = [x.flatten(0, 1).unbind(0) for x in tensors]
    return [tuple(chunks[s * m : (s + 1) * m] for chunks in flat) for s in range(n)]


@torch.compiler.disable  # hundreds of small products: minutes of compilation, and nothing to fuse
def delta_writes(memory: Tensor, fade: Tensor, drop: Tensor | None, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """M <- fade M at the start of a segment, then M <- M + w_t k_t (v_t - k_t M)^T for each of its tokens.

    Args:
        memory: [..., d, e].
        fade: [n, ...] of each segment; 0 where drop, [n, ...] bool, says so, however large M is.
        k, v, w: [n, m, ..., t, d], [n, m, ..., t, e], [n, m, ..., t]: m chunks a segment, of t tokens.

    Returns:
        [n + 1, ..., d, e]: the memory before each segment and after the last.
    """
    return _DeltaWrites.apply(memory, fade, drop, k, v, w)
