"""Elementwise functions of the decoder and its memory with hand-written backwards.

On long windows they are bound by memory bandwidth, and autograd's formulas make two to four times as many passes.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

_NO_CONTEXT = SimpleNamespace(save_for_backward=lambda *_: None)


class Fused(torch.autograd.Function):
    """Base of functions with a hand-written backward."""

    @classmethod
    def of(cls, *inputs):
        """`apply`, or `forward` alone where no gradient is wanted: of a single token, `apply` takes twice as long."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return cls.apply(*inputs)
        return cls.forward(_NO_CONTEXT, *inputs)


class _UnitSilu(Fused):
    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        x = x.contiguous()  # torch's loops over tensors of two layouts take four times as long
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


UNIT_EPS = 1e-6


def unit_silu(x: Tensor, eps: float = UNIT_EPS) -> Tensor:
    """s / sqrt(|s|^2 + eps) with s = silu(x) over the last dimension; the result is contiguous."""
    return _UnitSilu.of(x, eps)


class _Convolve(Fused):
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
    """For each j the inputs j tokens back: those of tokens j and later, which are in x, and of earlier tokens, in
    `before`."""
    length, width = x.shape[1], before.shape[1]
    for j in range(1, width + 1):
        yield j, (x[:, : max(length - j, 0)], before[:, width - j :][:, : min(j, length)])


def _masked(x: Tensor, reach: Tensor | None, j: int, old: bool = False) -> Tensor:
    if reach is None:
        return x
    reach = reach[:, : x.shape[1]] if old else reach[:, j : j + x.shape[1]]
    return torch.where(reach[..., None] >= j, x, 0)


def convolve(before_BJC: Tensor, x_BTC: Tensor, weight_JC: Tensor, reach_BT: Tensor | None) -> Tensor:
    """Causal depthwise convolution within documents.

    Args:
        before_BJC: the last inputs before x.
        x_BTC: inputs.
        weight_JC: the last row is for the token itself.
        reach_BT: number of earlier tokens of the same document, counted up to the width less one; None: all of them.
    """
    if torch.compiler.is_compiling():  # which fuses the plain form into one pass, and its backward too
        return _convolved(before_BJC, x_BTC, weight_JC, reach_BT)
    return _Convolve.of(before_BJC, x_BTC, weight_JC, reach_BT)


def _convolved(before: Tensor, x: Tensor, weight: Tensor, reach: Tensor | None) -> Tensor:
    width, length = before.shape[1], x.shape[1]
    padded, out = torch.cat((before, x), dim=1), x * weight[-1]
    for j in range(1, width + 1):
        tap = padded[:, width - j :][:, :length]
        out = out + _masked(tap, reach, j, old=True) * weight[-1 - j]
    return out


class _RmsNorm(Fused):
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
    """torch.nn.functional.rms_norm over the last dimension."""
    return _RmsNorm.of(x, weight, eps)


class _Rotate(Fused):
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
    out = x * cos
    (low, high), (sin, _), half = x.chunk(2, dim=-1), sin.chunk(2, dim=-1), x.shape[-1] // 2
    # Slices and not chunks: autograd forbids writing to one of several views, and exported graphs run under it.
    out[..., :half].addcmul_(high, sin, value=-sign)
    out[..., half:].addcmul_(low, sin, value=sign)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as Llama applies it: both halves of `cos` and `sin` are equal; x is [..., d] in any float dtype."""
    return _Rotate.of(x, cos, sin)


def rotate_token(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """`rotate` in three operations, without a gradient; signed_sin: sines whose first half is negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


class RMSNorm(nn.RMSNorm):
    """RMS norm with our fused form on a CPU, where torch's makes many passes, except over a single token."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype.itemsize < 4 or x.shape[-2] == 1:  # torch widens half precision itself
            return torch.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)
