"""Backwards written by hand against plain autograd and finite differences, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from infini_train.model.fused import convolve, delta_maps, rms_norm, unit_lower_inverse, unit_silu


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


def test_delta_maps():
    k, v, logits, memory = inputs((2, 3, 8, 3), (2, 3, 8, 4), (2, 3, 8), (2, 3, 4))
    k = F.normalize(k, dim=-1).detach().requires_grad_()
    w = torch.sigmoid(logits).detach().requires_grad_()
    less, add = delta_maps(k, v, w)
    expected = memory
    for chunk in range(3):
        for t in range(8):
            row = k[:, chunk, t, None]
            error = v[:, chunk, t, None] - row @ expected
            expected = expected + w[:, chunk, t, None, None] * row.mT @ error
    torch.testing.assert_close(memory - less @ memory + add, expected)
    gradcheck(delta_maps, (k, v, w))


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
