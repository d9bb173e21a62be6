"""Writes by small products of matrices, backwards by hand, against plain loops, autograd and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from infini_train.model.writes import affine_steps, delta_writes, solution, unit_lower_inverse
from tests.helpers.models import inputs


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


@pytest.mark.parametrize("drops", [False, True])
def test_affine_steps(drops):
    memory, transition, added = inputs((2, 3, 4), (5, 2, 3, 3), (5, 2, 3, 4))
    drop = torch.tensor([[False, True], [False, False], [True, False], [False, False], [False, True]])
    expected = [memory]
    for s in range(5):
        old = torch.stack([m * (not (drops and d)) for m, d in zip(expected[-1], drop[s], strict=True)])
        expected.append(torch.einsum("mij,mjk->mik", transition[s], old) + added[s])

    def steps(memory, transition, added):
        return affine_steps(memory, transition, added, drop if drops else None)

    torch.testing.assert_close(steps(memory, transition, added), torch.stack(expected))
    gradcheck(steps, (memory, transition, added))


@pytest.mark.parametrize("drops", [False, True])
def test_delta_writes(drops):
    n, m, t = 3, 2, 8
    k, v, logits, memory, decay = inputs((n, m, 2, t, 3), (n, m, 2, t, 4), (n, m, 2, t), (2, 3, 4), (n, 2))
    k = F.normalize(k, dim=-1).detach().requires_grad_()
    w, decay = (torch.sigmoid(x).detach().requires_grad_() for x in (logits, decay))
    drop = torch.tensor([[False, False], [True, False], [True, True]]) if drops else None
    expected = [memory]
    for s in range(n):
        now = expected[-1] * (decay if drop is None else decay.masked_fill(drop, 0))[s, :, None, None]
        for chunk in range(m):
            for i in range(t):
                row = k[s, chunk, :, i, None]
                now = now + w[s, chunk, :, i, None, None] * row.mT @ (v[s, chunk, :, i, None] - row @ now)
        expected.append(now)

    def writes(memory, decay, k, v, w):  # values as they come: not contiguous
        return delta_writes(memory, decay, drop, k, v.mT, w)

    arguments = memory, decay, k, v.detach().mT.contiguous().requires_grad_(), w
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
    decay, drop = torch.tensor([[1.0], [0.0]]), torch.tensor([[False], [True]])
    assert delta_writes(torch.full((1, 2, 2), torch.inf), decay, drop, k, v, w)[2].eq(0).all()


@pytest.mark.parametrize("chunk", [8, 32])
@pytest.mark.parametrize("drops", [False, True])
def test_operators_for_torch_compile(monkeypatch, chunk, drops):
    """They are what they say (fake results, gradients, no aliases), and give what eager functions give."""
    memory, decay, k, v, w = inputs((2, 3, 4), (3, 2), (3, 2, 2, chunk, 3), (3, 2, 2, chunk, 4), (3, 2, 2, chunk))
    drop = torch.tensor([[False, True], [False, False], [True, False]]) if drops else None
    with torch.no_grad():
        k.mul_(0.3)
    lower, transition, added = (x.detach().requires_grad_() for x in (k @ k.mT, (k.mT @ k)[:, 0], (k.mT @ v)[:, 0]))
    calls = {
        "delta_writes": (delta_writes, (memory, decay, drop, k, v, w)),
        "solution": (solution, (lower, k)),
        "affine_steps": (affine_steps, (memory, transition, added, drop)),
    }

    def found():
        results = [function(*arguments) for function, arguments in calls.values()]
        total = sum(result.sin().sum() for result in results)
        return *results, *torch.autograd.grad(total, (memory, decay, k, v, w, lower, transition, added))

    for name, (_, arguments) in calls.items():
        torch.library.opcheck(getattr(torch.ops.infini_train, name).default, arguments)
    expected = found()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(found(), expected)
