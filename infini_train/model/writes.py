"""How memories are written, step after step: small products of matrices, with backwards written by hand.

Each is compared with plain loops under autograd in tests/numerics/test_writes.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.linalg import solve_triangular

Shapes = tuple[tuple[int, ...], ...]


@dataclass
class _Steps:
    """A function of tensors and its backward, whose first result alone has a gradient.

    torch.compile takes them as they are, as operators: hundreds of small steps would take minutes to compile, with
    little to fuse, and what is left out of a graph cuts it in pieces, between which nothing is fused either. Else
    they are an autograd function, in which those who count FLOPs and memory see what is inside.

    name: of the operator.
    forward: inputs -> results.
    backward: gradient of the first result, what `keep` keeps -> gradients.
    keep: inputs, results -> what backward needs.
    place: gradients -> that of each input, None for those without.
    shapes, backward_shapes: of the arguments of forward and backward -> of their results.
    """

    name: str
    forward: Callable
    backward: Callable
    keep: Callable[[tuple, tuple], tuple]
    place: Callable[..., tuple]
    shapes: Callable[..., Shapes]
    backward_shapes: Callable[..., Shapes]

    def __post_init__(self) -> None:
        self.operator = self._operator(self.name, self.forward, self.shapes)
        backward = self._operator(f"{self.name}_backward", self.backward, self.backward_shapes)
        self.operator.register_autograd(self._back_by(backward), setup_context=self._set_up)
        methods = {"forward": self.forward, "setup_context": self._set_up, "backward": self._back_by(self.backward)}
        members = {name: staticmethod(method) for name, method in methods.items()}
        self.function: Any = type(self.name, (torch.autograd.Function,), members)

    def __call__(self, *inputs: Tensor | None) -> Any:
        return (self.operator if torch.compiler.is_compiling() else self.function.apply)(*inputs)

    @staticmethod
    def _operator(name: str, function: Callable, shapes: Callable[..., Shapes]) -> Any:
        operator = custom_op(f"infini_train::{name}", function, mutates_args=())

        def fake(first: Tensor, *others: Tensor | None):
            results = tuple(first.new_empty(shape) for shape in shapes(first, *others))
            return results if len(results) > 1 else results[0]

        operator.register_fake(fake)
        return operator

    def _set_up(self, ctx, inputs: tuple, output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(*self.keep(inputs, results))

    def _back_by(self, backward: Callable) -> Callable:
        def back(ctx, grad: Tensor | None, *_: None) -> tuple:
            if grad is None:  # of what nothing depends on; zeros would be made for every result
                return (None,) * len(ctx.needs_input_grad)
            return self.place(*backward(grad, *ctx.saved_tensors))

        return back


def _write(
    memory: Tensor, fade: Tensor, drop: Tensor | None, k: Tensor, v: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With L = tril(w K K^T, -1) and X = w (I + L)^-T K of a chunk, M' = M + X^T (V - K M); and all for backward."""
    (n, m, *batch, t, d), e = k.shape, v.shape[-1]
    k, w, fade = k.reshape(n, m, -1, t, d), w.reshape(n, m, -1, t), fade.reshape(n, -1, 1, 1)
    u = torch.empty_like(v, memory_format=torch.contiguous_format).copy_(v).view(n, m, -1, t, e)
    gram = k @ k.mT
    y, inverse = _solve(gram * w[..., None], k)
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
    return before.view(n + 1, *batch, d, e), gram, inverse, y, u, within


def _write_backward(
    grad: Tensor,
    fade: Tensor,
    k: Tensor,
    w: Tensor,
    before: Tensor,
    gram: Tensor,
    inverse: Tensor,
    y: Tensor,
    u: Tensor,
    within: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of memory, fade, k, v, w."""
    shapes = _write_gradients(grad, fade, k, w, before, gram, inverse, y, u, within)
    (n, m, _, t, e), d = u.shape, k.shape[-1]
    k, w, fade = k.reshape(n, m, -1, t, d), w.reshape(n, m, -1, t), fade.reshape(n, -1, 1, 1)
    grad, before = grad.reshape(n + 1, -1, d, e), before.view(n + 1, -1, d, e)
    x = y * w[..., None]
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
    less, b = _solve_backward(grad_x.mul_(w[..., None]), y, inverse)
    grad_w -= (less * gram).sum(-1)
    less.mul_(w[..., None])
    grad_k = b.sub_(grad_u @ within.mT).sub_((less + less.mT) @ k)
    memory, fade, k, v, w = (
        x.view(of) for x, of in zip((grad_memory, grad_fade, grad_k, grad_u, grad_w), shapes, strict=True)
    )
    return memory, fade, k, v, w


def _write_gradients(grad, fade, k, w, before, gram, inverse, y, u, within) -> Shapes:
    return before.shape[1:], fade.shape, k.shape, (*k.shape[:-1], u.shape[-1]), w.shape


def _write_shapes(memory, fade, drop, k, v, w) -> Shapes:
    (n, m, *batch, t, d), e = k.shape, v.shape[-1]
    kept = ((n, m, math.prod(batch), *of) for of in ((t, t), (t, t), (t, d), (t, e), (d, e)))
    return (n + 1, *batch, d, e), *kept


_delta_writes = _Steps(
    "delta_writes",
    _write,
    _write_backward,
    keep=lambda inputs, results: (inputs[1], inputs[3], inputs[5], *results),
    place=lambda memory, fade, k, v, w: (memory, fade, None, k, v, w),
    shapes=_write_shapes,
    backward_shapes=_write_gradients,
)


def delta_writes(memory: Tensor, fade: Tensor, drop: Tensor | None, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """M <- fade M at the start of a segment, then M <- M + w_t k_t (v_t - k_t M)^T for each of its tokens.

    Args:
        memory: [..., d, e].
        fade: [n, ...] of each segment; 0 where drop, [n, ...] bool, says so, however large M is.
        k, v, w: [n, m, ..., t, d], [n, m, ..., t, e], [n, m, ..., t]: m chunks a segment, of t tokens.

    Returns:
        [n + 1, ..., d, e]: the memory before each segment and after the last.
    """
    return _delta_writes(memory, fade, drop, k, v, w)[0]


def _solve(lower: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    inverse = unit_lower_inverse(
        lower
    ).contiguous()  # as operators' results are said to be; a copy of small ones only
    return inverse.mT @ k, inverse


def _solve_backward(grad: Tensor, y: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """(I + L)^T Y = K: K's gradient B solves (I + L) B = Y's, and L's is -Y B^T, here without the minus."""
    b = inverse @ grad
    return (y @ b.mT).tril_(-1), b


_solution = _Steps(
    "solution",
    _solve,
    _solve_backward,
    keep=lambda inputs, results: results,
    place=lambda less, b: (-less, b),
    shapes=lambda lower, k: (k.shape, lower.shape),
    backward_shapes=lambda grad, y, inverse: (inverse.shape, y.shape),
)


def solution(lower: Tensor, k: Tensor) -> Tensor:
    """Y [..., t, d] of (I + tril(lower, -1))^T Y = k; lower [..., t, t]."""
    return _solution(lower, k)[0]


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


def _step(memory: Tensor, kept: Tensor, added: Tensor, drop: Tensor | None) -> Tensor:
    out = memory.new_empty(len(kept) + 1, *memory.shape)
    out[0] = memory
    states = out.unbind(0)
    for s, (keep, add) in enumerate(zip(kept.unbind(0), added.unbind(0), strict=True)):
        old = states[s]
        if drop is not None:  # it may be infinite
            old = old.masked_fill(drop[s, :, None, None], 0)
        torch.baddbmm(add, keep, old, out=states[s + 1])
    return out


def _step_backward(grad: Tensor, kept: Tensor, drop: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of each state, with all that follows from it, and of `kept`."""
    if drop is not None:
        kept = kept.masked_fill(drop[..., None, None], 0)
    grad = grad.clone(memory_format=torch.contiguous_format)
    grads = grad.unbind(0)
    for keep, before, after in zip(kept.mT.unbind(0)[::-1], grads[-2::-1], grads[:0:-1], strict=True):
        torch.baddbmm(before, keep, after, out=before)
    grad_kept = grad[1:] @ out[:-1].mT
    if drop is not None:
        grad_kept.masked_fill_(drop[..., None, None], 0)
    return grad, grad_kept


_affine_steps = _Steps(
    "affine_steps",
    _step,
    _step_backward,
    keep=lambda inputs, results: (inputs[1], inputs[3], *results),
    place=lambda grad, kept: (grad[0], kept, grad[1:], None),
    shapes=lambda memory, kept, added, drop: ((len(kept) + 1, *memory.shape),),
    backward_shapes=lambda grad, kept, drop, out: (grad.shape, kept.shape),
)


def affine_steps(memory: Tensor, kept: Tensor, added: Tensor, drop: Tensor | None) -> Tensor:
    """M <- kept M + added, step after step, where `drop` says so of an M that counts as 0, however large it is.

    Args:
        memory: [m, d, e].
        kept, added: [n, m, d, d], [n, m, d, e].
        drop: [n, m] bool; None: nothing is dropped.

    Returns:
        [n + 1, m, d, e]: the memory before each step and after the last.
    """
    return _affine_steps(memory, kept, added, drop)
