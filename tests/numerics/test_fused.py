"""Backwards written by hand against plain autograd and finite differences, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from infini_train.model.fused import convolve, delta_writes, rms_norm, unit_lower_inverse, unit_silu


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


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_convolve(length, masked):
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


def test_what_is_dropped_may_be_infinite():
    k, v, w = torch.ones(2, 1, 1, 8, 2), torch.ones(2, 1, 1, 8, 2), torch.zeros(2, 1, 1, 8)
    fade, drop = torch.tensor([[1.0], [0.0]]), torch.tensor([[False], [True]])
    assert delta_writes(torch.full((1, 2, 2), torch.inf), fade, drop, k, v, w)[2].eq(0).all()


@pytest.mark.parametrize("size", [8, 16, 64])
def test_unit_lower_inverse(size):
    (x,) = inputs((3, 2, size, size))
    identity = torch.eye(size, dtype=x.dtype).expand(x.shape)
    expected = torch.linalg.solve_triangular(x.detach(), identity, upper=False, unitriangular=True)
    torch.testing.assert_close(unit_lower_inverse(x.detach()), expected)
    # Keys that are all the same, written in full: the inverse is small, but not the powers of what is inverted.
    same = torch.ones(1, 1, size, size)
    expected = torch.eye(size) - torch.ones(size - 1).diag(-1)
    torch.testing.assert_close(unit_lower_inverse(same)[0, 0], expected)
