"""Backwards written by hand against plain autograd and finite differences, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from infini_train.model.fused import (
    affine_steps,
    convolve,
    delta_writes,
    rms_norm,
    rotate,
    solution,
    unit_lower_inverse,
    unit_silu,
)


def inputs(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_unit_silu():
    (x,) = inputs((2, 3, 5))
    silu = F.silu(x)
    torch.testing.assert_close(unit_silu(x), silu / (silu.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    gradcheck(lambda x: unit_silu(x.transpose(0, 1), 0.1), (x,))


def test_rms_norm():
    x, weight = inputs((2, 3, 5), (5,))
    torch.testing.assert_close(rms_norm(x, weight, 0.1), F.rms_norm(x, (5,), weight, 0.1))
    gradcheck(lambda x, weight: rms_norm(x, weight, 0.1), (x, weight))


def test_rotate_is_llamas():
    q, k = inputs((2, 3, 5, 4), (2, 3, 5, 4))
    half = torch.randn(1, 5, 2, dtype=torch.float64)
    cos, sin = half.cos().repeat(1, 1, 2), half.sin().repeat(1, 1, 2)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close(
        (rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])), expected
    )
    gradcheck(lambda x: rotate(x.transpose(0, 1), cos[:, None], sin[:, None]), (q,))


def test_rotate_of_halves_is_in_the_dtype_of_both():
    """Under autocast projections are bfloat16, cosines float32."""
    x = torch.randn(2, 4).bfloat16().requires_grad_()
    cos, sin = torch.ones(2, 4), torch.ones(2, 4)
    out = rotate(x, cos, sin)
    out.sum().backward()
    expected = x.float() + torch.cat((-x[:, 2:], x[:, :2]), dim=-1).float()
    torch.testing.assert_close((out, x.grad.float()), (expected, torch.tensor([2.0, 2, 0, 0]).expand(2, 4)))


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compiling", [False, True])
def test_convolve(monkeypatch, length, masked, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    before, x, weight = inputs((2, 3, 4), (2, length, 4), (4, 4))
    reach = torch.randint(4, (2, length)) if masked else None
    padded = torch.cat((before, x), dim=1)
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(length):
            for j in range(4 if reach is None else int(reach[b, t]) + 1):
                expected[b, t] += weight[3 - j] * padded[b, t + 3 - j]
    torch.testing.assert_close(convolve(before, x, weight, reach), expected)
    gradcheck(lambda before, x, weight: convolve(before, x, weight, reach), (before, x, weight))


@pytest.mark.parametrize("size", [1, 7, 24, 50, 64])
def test_unit_lower_inverse(size):
    """In float32, of writes under keys at random, and of full writes under one key, whose powers grow fastest."""
    torch.manual_seed(0)
    keys = F.normalize(torch.randn(3, 2, size, 8), dim=-1)
    keys[0] = keys[0, 0, 0]
    lower = keys @ keys.mT
    expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + lower.double().tril(-1))
    torch.testing.assert_close(unit_lower_inverse(lower), expected.float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [3, 32])
def test_solution(size):
    lower, k = inputs((2, size, size), (2, size, 3))
    system = torch.eye(size, dtype=torch.float64) + lower.tril(-1)
    torch.testing.assert_close(solution(lower, k), torch.linalg.solve(system.mT, k), rtol=1e-6, atol=1e-6)
    lower = 0.1 * lower.detach()  # its inverse grows with the power of its size
    gradcheck(solution, (lower.requires_grad_(), k))


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_affine_steps(monkeypatch, drops, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    memory, kept, added = inputs((2, 3, 4), (5, 2, 3, 3), (5, 2, 3, 4))
    drop = torch.tensor([[False, True], [False, False], [True, False], [False, False], [False, True]])
    expected = [memory]
    for s in range(5):
        old = torch.stack([m * (not (drops and d)) for m, d in zip(expected[-1], drop[s], strict=True)])
        expected.append(torch.einsum("mij,mjk->mik", kept[s], old) + added[s])

    def steps(memory, kept, added):
        return affine_steps(memory, kept, added, drop if drops else None)

    torch.testing.assert_close(steps(memory, kept, added), torch.stack(expected))
    gradcheck(steps, (memory, kept, added))


@pytest.mark.parametrize("drops", [False, True])
def test_delta_writes(drops):
    n, m, t = 3, 2, 8
    k, v, logits, memory, fade = inputs((n, m, 2, t, 3), (n, m, 2, t, 4), (n, m, 2, t), (2, 3, 4), (n, 2))
    k = F.normalize(k, dim=-1).detach().requires_grad_()
    w, fade = (torch.sigmoid(x).detach().requires_grad_() for x in (logits, fade))
    drop = torch.tensor([[False, False], [True, False], [True, True]]) if drops else None
    expected = [memory]
    for s in range(n):
        now = expected[-1] * (fade if drop is None else fade.masked_fill(drop, 0))[s, :, None, None]
        for chunk in range(m):
            for i in range(t):
                row = k[s, chunk, :, i, None]
                now = now + w[s, chunk, :, i, None, None] * row.mT @ (v[s, chunk, :, i, None] - row @ now)
        expected.append(now)

    def writes(memory, fade, k, v, w):  # values as they come: not contiguous
        faded = fade if drop is None else fade.masked_fill(drop, 0)
        return delta_writes(memory, faded, drop, k, v.mT, w)

    arguments = memory, fade, k, v.detach().mT.contiguous().requires_grad_(), w
    torch.testing.assert_close(writes(*arguments), torch.stack(expected))
    gradcheck(writes, arguments)


def test_delta_writes_of_one_key():
    """64 full writes under one key, in float32: the last value alone is there, and takes all of the gradient."""
    torch.manual_seed(0)
    key = F.normalize(torch.randn(8), dim=0)
    memory, v = torch.randn(1, 8, 4), torch.randn(1, 1, 1, 64, 4, requires_grad=True)
    k, w = key.expand(1, 1, 1, 64, 8), torch.ones(1, 1, 1, 64)
    after = delta_writes(memory, torch.ones(1, 1), None, k, v, w)[-1, 0]
    expected = memory[0] + torch.outer(key, v[0, 0, 0, -1] - key @ memory[0])
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
    (grad,) = torch.autograd.grad((key @ after).sum(), v)
    torch.testing.assert_close(grad[0, 0, 0], F.one_hot(torch.tensor(63), 64)[:, None].float().expand(64, 4))


def test_what_is_dropped_may_be_infinite():
    infinite, drop = torch.full((1, 2, 2), torch.inf), torch.tensor([[False], [True]])
    assert affine_steps(infinite, torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), drop)[2].eq(0).all()
    k, v, w = torch.ones(2, 1, 1, 8, 2), torch.ones(2, 1, 1, 8, 2), torch.zeros(2, 1, 1, 8)
    fade, drop = torch.tensor([[1.0], [0.0]]), torch.tensor([[False], [True]])
    assert delta_writes(torch.full((1, 2, 2), torch.inf), fade, drop, k, v, w)[2].eq(0).all()
