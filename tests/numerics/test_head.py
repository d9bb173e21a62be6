"""Losses in chunks, gradients in forward: the same as cross-entropy of all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from infini_train.model import cross_entropy
from infini_train.model.head import LanguageHead

V, D = 37, 8


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[LanguageHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(V, shape)
    labels[torch.rand(shape) < 0.2] = -100
    return LanguageHead(D, V).to(dtype), torch.randn(*shape, D, dtype=dtype, requires_grad=True), labels


def plain(layer: LanguageHead, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """In float64, from the same numbers."""
    logits = F.linear(x.double(), layer.weight.double())
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1024])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]
)
def test_equals_cross_entropy_of_all_logits(monkeypatch, chunk, dtype, tolerance):
    monkeypatch.setattr(cross_entropy, "LOSS_CHUNK", chunk)
    layer, x, labels = inputs((3, 21), dtype)
    expected = plain(layer, x, labels)
    wanted = torch.autograd.grad(0.3 * expected.sum(), (x, layer.weight))
    total, losses = layer(x, labels)
    found = torch.autograd.grad(0.3 * total, (x, layer.weight))
    assert total.dtype == losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not losses.requires_grad and (losses[labels == -100] == 0).all()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    # The sum is no coarser than its terms, though they are of bfloat16 logits.
    torch.testing.assert_close(total.double(), losses.double().sum(), rtol=1e-6, atol=0)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * max(1, b.abs().max().item()))


def test_without_gradients_none_are_made():
    layer, x, labels = inputs((50,), torch.float64)
    with torch.no_grad():
        total, losses = layer(x, labels)
    assert not total.requires_grad
    torch.testing.assert_close(losses, plain(layer, x, labels).detach())


class Products(TorchDispatchMode):
    """Dtypes of the factors of matrix products: in float32 they take ten times as long on a GPU."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func._schema.name:
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def test_under_autocast_products_are_half_precision_and_sums_are_not():
    layer, x, labels = inputs((40,), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
        total, _ = layer(x, labels)
    assert len(products.dtypes) == 3 and set(products.dtypes) == {torch.bfloat16}
    (gradient,) = torch.autograd.grad(total, x)
    assert total.dtype == gradient.dtype == torch.float32
    exact = plain(layer, x, labels).sum().item()
    assert total.item() == pytest.approx(exact, rel=1e-2) and total.item() != pytest.approx(exact, rel=1e-6)


def test_all_logits_never_exist(monkeypatch):
    """No tensor of the forward pass has more elements than those of one chunk, or the weight."""
    monkeypatch.setattr(cross_entropy, "LOSS_CHUNK", 4)
    layer, x, labels = inputs((400,), torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        total, _ = layer(x, labels)
    total.backward()
    assert max(sizes) <= max(400 * D, V * D)
