"""The recurrences by which memories are written: many small matrix products in turn, with hand-written backwards."""

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
class _Recurrence:
    """A function of tensors with a hand-written backward. Only its first result has a gradient.

    Under torch.compile it is a custom op, so that a decoder layer has no graph break: hundreds of small steps would
    take minutes to compile, with little to fuse. In eager mode it is an autograd function, because tools that count
    FLOPs and memory cannot look into a custom op.

    Attributes:
        name: of the custom op.
        forward: computes the results from the inputs.
        backward: computes the gradients from that of the first result and from what `keep` returned.
        keep: selects what backward needs from inputs and results.
        place: assigns the gradients to the inputs; None for inputs without one.
        shapes, backward_shapes: shapes of the results of forward and backward, from their arguments.
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
            if grad is None:  # nothing depends on the first result
                return (None,) * len(ctx.needs_input_grad)
            return self.place(*backward(grad, *ctx.saved_tensors))

        return back


def _write(
    memory: Tensor, decay: Tensor, drop: Tensor | None, k: Tensor, v: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For each chunk M' = M + X^T (V - K M) with L = tril(w K K^T, -1) and X = w (I + L)^-T K.

    Returns the memories, and the intermediate results that backward needs.
    """
    (n, m, *batch, t, d), e = k.shape, v.shape[-1]
    k, w, decay = k.reshape(n, m, -1, t, d), w.reshape(n, m, -1, t), decay.reshape(n, -1, 1, 1)
    u = torch.empty_like(v, memory_format=torch.contiguous_format).copy_(v).view(n, m, -1, t, e)
    gram = k @ k.mT
    y, inverse = _solve(gram * w[..., None], k)
    x = y * w[..., None]
    before = memory.new_empty(n + 1, decay.shape[1], d, e)
    within = memory.new_empty(n, m, decay.shape[1], d, e)  # before each chunk
    before[0] = memory.reshape(-1, d, e)
    befores = before.unbind(0)
    for s, (olds, *chunks) in enumerate(_each(within, k, x.mT, u)):
        torch.mul(befores[s], decay[s], out=olds[0])
        if drop is not None:
            olds[0].masked_fill_(drop[s].reshape(-1, 1, 1), 0)
        for old, k_i, x_i, u_i, new in zip(olds, *chunks, (*olds[1:], befores[s + 1]), strict=True):
            torch.baddbmm(u_i, k_i, old, alpha=-1, out=u_i)  # V - K M
            torch.baddbmm(old, x_i, u_i, out=new)
    return before.view(n + 1, *batch, d, e), gram, inverse, y, u, within


def _write_backward(
    grad: Tensor,
    decay: Tensor,
    k: Tensor,
    w: Tensor,
    before: Tensor,
    gram: Tensor,
    inverse: Tensor,
    y: Tensor,
    u: Tensor,
    within: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of memory, decay, k, v, w."""
    shapes = _write_gradients(grad, decay, k, w, before, gram, inverse, y, u, within)
    (n, m, _, t, e), d = u.shape, k.shape[-1]
    k, w, decay = k.reshape(n, m, -1, t, d), w.reshape(n, m, -1, t), decay.reshape(n, -1, 1, 1)
    grad, before = grad.reshape(n + 1, -1, d, e), before.view(n + 1, -1, d, e)
    x = y * w[..., None]
    grad_u, grad_after, grad_decay = torch.empty_like(u), torch.empty_like(within), torch.empty_like(decay)
    grad_after[-1, -1] = grad[-1]
    grad_within, grad_memory = torch.empty_like(before[0]), torch.empty_like(before[0])
    segments = _each(grad_after, k.mT, x, grad_u)
    for s in range(len(segments) - 1, -1, -1):
        news, *chunks = segments[s]
        olds = grad_within, *news[:-1]
        for new, k_i, x_i, u_i, old in reversed(list(zip(news, *chunks, olds, strict=True))):
            torch.bmm(x_i, new, out=u_i)
            torch.baddbmm(new, k_i, u_i, alpha=-1, out=old)
        torch.sum(grad_within * before[s], (-2, -1), keepdim=True, out=grad_decay[s])
        torch.addcmul(grad[s], grad_within, decay[s], out=grad_after[s - 1, -1] if s else grad_memory)

    grad_x = u @ grad_after.mT
    grad_w = (grad_x * y).sum(-1)
    less, b = _solve_backward(grad_x.mul_(w[..., None]), y, inverse)
    grad_w -= (less * gram).sum(-1)
    less.mul_(w[..., None])
    grad_k = b.sub_(grad_u @ within.mT).sub_((less + less.mT) @ k)
    memory, decay, k, v, w = (
        x.view(of) for x, of in zip((grad_memory, grad_decay, grad_k, grad_u, grad_w), shapes, strict=True)
    )
    return memory, decay, k, v, w


def _write_gradients(grad, decay, k, w, before, gram, inverse, y, u, within) -> Shapes:
    return before.shape[1:], decay.shape, k.shape, (*k.shape[:-1], u.shape[-1]), w.shape


def _write_shapes(memory, decay, drop, k, v, w) -> Shapes:
    (n, m, *batch, t, d), e = k.shape, v.shape[-1]
    kept = ((n, m, math.prod(batch), *of) for of in ((t, t), (t, t), (t, d), (t, e), (d, e)))
    return (n + 1, *batch, d, e), *kept


_delta_writes = _Recurrence(
    "delta_writes",
    _write,
    _write_backward,
    keep=lambda inputs, results: (inputs[1], inputs[3], inputs[5], *results),
    place=lambda memory, decay, k, v, w: (memory, decay, None, k, v, w),
    shapes=_write_shapes,
    backward_shapes=_write_gradients,
)


def delta_writes(memory: Tensor, decay: Tensor, drop: Tensor | None, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """M <- decay * M at the start of each segment, then M <- M + w_t k_t^T (v_t - k_t M) for each of its tokens.

    Args:
        memory: [..., d, e].
        decay: the factor of each segment, from 0 to 1, [n, ...].
        drop: bool [n, ...]; where true the memory before the segment counts as 0, even if it is infinite.
        k, v, w: keys [n, m, ..., t, d], values [n, m, ..., t, e] and write strengths [n, m, ..., t] of m chunks of t
            tokens in each of n segments.

    Returns:
        [n + 1, ..., d, e]: the memory before each segment and after the last.
    """
    if drop is not None:
        decay = decay.masked_fill(drop, 0)  # by this alone, backward knows what is dropped
    return _delta_writes(memory, decay, drop, k, v, w)[0]


def _solve(lower: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    inverse = unit_lower_inverse(lower).contiguous()  # the fake results of a custom op are contiguous
    return inverse.mT @ k, inverse


def _solve_backward(grad: Tensor, y: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Of (I + L)^T Y = K: the gradient B of K solves (I + L) B = grad, and that of L is -Y B^T; returned without the
    minus."""
    b = inverse @ grad
    return (y @ b.mT).tril_(-1), b


_solution = _Recurrence(
    "solution",
    _solve,
    _solve_backward,
    keep=lambda inputs, results: results,
    place=lambda less, b: (-less, b),
    shapes=lambda lower, k: (k.shape, lower.shape),
    backward_shapes=lambda grad, y, inverse: (inverse.shape, y.shape),
)


def solution(lower: Tensor, k: Tensor) -> Tensor:
    """Solve (I + tril(lower, -1))^T Y = k for Y [..., t, d]; lower is [..., t, t]."""
    return _solution(lower, k)[0]


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + tril(lower, -1))^-1 over the last two dimensions.

    On a CPU torch solves the systems of a batch one after the other, on one thread. Therefore it only inverts the
    small diagonal blocks here, and products of matrices do the rest.
    """
    size = lower.shape[-1]
    while size > 16 and size % 2 == 0:
        size //= 2
    identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
    # The inverses of all diagonal blocks. torch returns solutions as columns; those of the transposed system are
    # rows.
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
    """For each segment, the chunks of each tensor [n, m, ...]."""
    n, m = tensors[0].shape[:2]
    flat = [x.flatten(0, 1).unbind(0) for x in tensors]
    return [tuple(chunks[s * m : (s + 1) * m] for chunks in flat) for s in range(n)]


def _step(memory: Tensor, transition: Tensor, added: Tensor, drop: Tensor | None) -> Tensor:
    out = memory.new_empty(len(transition) + 1, *memory.shape)
    out[0] = memory
    states = out.unbind(0)
    for s, (step, add) in enumerate(zip(transition.unbind(0), added.unbind(0), strict=True)):
        old = states[s]
        if drop is not None:  # a mask, not a factor of 0, because the memory may be infinite
            old = old.masked_fill(drop[s, :, None, None], 0)
        torch.baddbmm(add, step, old, out=states[s + 1])
    return out


def _step_backward(grad: Tensor, transition: Tensor, drop: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the state before each step, everything after it included, and of `transition`."""
    if drop is not None:
        transition = transition.masked_fill(drop[..., None, None], 0)
    grad = grad.clone(memory_format=torch.contiguous_format)
    grads = grad.unbind(0)
    for step, before, after in zip(transition.mT.unbind(0)[::-1], grads[-2::-1], grads[:0:-1], strict=True):
        torch.baddbmm(before, step, after, out=before)
    grad_transition = grad[1:] @ out[:-1].mT
    if drop is not None:
        grad_transition.masked_fill_(drop[..., None, None], 0)
    return grad, grad_transition


_affine_steps = _Recurrence(
    "affine_steps",
    _step,
    _step_backward,
    keep=lambda inputs, results: (inputs[1], inputs[3], *results),
    place=lambda grad, transition: (grad[0], transition, grad[1:], None),
    # shape[0], because len(transition) would be a constant of torch.export
    shapes=lambda memory, transition, added, drop: ((transition.shape[0] + 1, *memory.shape),),
    backward_shapes=lambda grad, transition, drop, out: (grad.shape, transition.shape),
)


def affine_steps(memory: Tensor, transition: Tensor, added: Tensor, drop: Tensor | None) -> Tensor:
    """M <- transition M + added, n times.

    Args:
        memory: [r, d, e], r independent memories.
        transition, added: [n, r, d, d] and [n, r, d, e].
        drop: bool [n, r]; where true the memory before the step counts as 0, even if it is infinite. None: nowhere.

    Returns:
        [n + 1, r, d, e]: the memory before each step and after the last.
    """
    return _affine_steps(memory, transition, added, drop)
