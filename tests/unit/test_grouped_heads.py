"""Local attention with fewer key/value heads than query heads: which of torch's kernels can take it."""

import pytest
import torch
import torch.nn.functional as F

from infini_train.model import attention


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Record query heads, key heads and enable_gqa of every call of torch's attention."""
    made, original = [], F.scaled_dot_product_attention

    def record(q, k, v, *args, enable_gqa=False, **options):
        made.append((q.shape[1], k.shape[1], enable_gqa))
        return original(q, k, v, *args, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", record)
    return made


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [2, 6])
def test_no_grouped_heads_with_a_mask_on_an_accelerator(monkeypatch, masked, heads):
    made = calls(monkeypatch)
    q, (k, v) = torch.empty(3, heads, 4, 8, device="meta"), torch.empty(2, 3, 2, 4, 8, device="meta").unbind()
    mask = torch.empty(1, 1, 4, 4, dtype=torch.bool, device="meta") if masked else None
    assert attention.attend(q, k, v, mask).shape == q.shape
    assert made == [(heads, heads if masked else 2, heads == 6 and not masked)]


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_softmax(queries, masked):
    """Query head h attends to key/value head h // (heads / kv heads); a single query sees all keys."""
    torch.manual_seed(0)
    q = torch.randn(2, 6, queries, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 5, 8, dtype=torch.float64)
    mask = torch.ones(queries, 5, dtype=torch.bool).tril(5 - queries)
    mask[:, 2] &= not masked
    found = attention.attend(q, k, v, mask[None, None] if masked else None)
    for head in range(6):
        scores = q[:, head] @ k[:, head // 3].mT / 8**0.5
        expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, head // 3]
        torch.testing.assert_close(found[:, head], expected)
