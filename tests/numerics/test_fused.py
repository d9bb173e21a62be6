"""Backwards written by hand against plain autograd and finite differences, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from infini_train.model.fused import convolve, rms_norm, rotate, unit_silu
from tests.helpers.models import inputs


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
