"""The comparison with the loop must notice each fault of other implementations listed at the end of
docs/architecture.md.

A comparison that lets a planted fault pass would not protect us from it.
"""

import pytest
import torch

from infini_train.model import attention as attention_file
from infini_train.model import paper_rules
from infini_train.model.attention import InfiniAttention
from infini_train.model.memory_rule import scan
from infini_train.model.paper_rules import PaperDelta, PaperLinear
from tests.helpers.models import RULES, build, rows, run_windows
from tests.helpers.reference import row_logits

WINDOW = 12


def error_of(memory: str, plant=None) -> float:
    """Largest difference of the model's logits from the loop's, after `plant(model)` changed the model."""
    model = build(memory)
    ids, starts = rows("anywhere")
    theirs = torch.stack([row_logits(model, i, s) for i, s in zip(ids, starts, strict=True)])
    if plant:
        plant(model)
    return (run_windows(model, ids, starts, WINDOW) - theirs).abs().max().item()


@pytest.mark.parametrize("memory", RULES)
def test_without_a_fault(memory):
    assert error_of(memory) < 1e-10


def test_memory_not_causal(monkeypatch):
    """Inclusive instead of exclusive sums: a segment reads itself."""

    def inclusive(initial, added_bn, keep_bn, context=None):
        sums = right(initial, added_bn, keep_bn, context)
        return torch.cat((sums[:, 1:], sums[:, -1:]), dim=1)

    right = paper_rules.scan
    monkeypatch.setattr(paper_rules, "scan", inclusive)
    assert error_of("paper-linear") > 1e-3


def test_gate_inverted():
    def plant(model):
        for layer in model.model.layers:
            layer.self_attn.gate.data.neg_()

    assert error_of("paper-linear", plant) > 1e-3


def test_key_value_head_mapping(monkeypatch):
    """Query head h reading the memory of h % kv_heads instead of h // (heads / kv_heads)."""
    original = PaperLinear.read_and_write

    def interleaved(self, state, q, *others):
        order = torch.arange(4).view(2, 2).T.flatten()  # (k, g) -> (g, k)
        out = original(self, state, q.flatten(2, 3)[:, :, order].view_as(q), *others)
        return out._replace(read=out.read.flatten(2, 3)[:, :, order.argsort()].view_as(out.read))

    monkeypatch.setattr(PaperLinear, "read_and_write", interleaved)
    assert error_of("paper-linear") > 1e-3


def test_no_epsilon(monkeypatch):
    """0 / 0 on the empty memory."""
    monkeypatch.setattr(paper_rules, "EPS", 0.0)
    assert not error_of("paper-linear") < 1e-10


def test_rope_in_memory(monkeypatch):
    right = InfiniAttention._local_attention

    def rotated(self, q, k, v, window):
        out = right(self, q, k, v, window)
        b, n = q.shape[:2]
        for x, rope in ((q, window.rope_q), (k, window.rope_k)):
            x.copy_(attention_file.rotate(x.flatten(0, 1), *rope).unflatten(0, (b, n)))
        return out

    monkeypatch.setattr(InfiniAttention, "_local_attention", rotated)
    with torch.no_grad():
        assert error_of("paper-linear") > 1e-3


def test_value_minus_one_in_delta(monkeypatch):
    """Writing V - 1 instead of V - sigma(K) M / (sigma(K) z)."""

    def minus_one(self, m, z, k, v, keep_bn, context):
        return scan(m, k.transpose(-1, -2) @ (v - 1), keep_bn, context)

    monkeypatch.setattr(PaperDelta, "write", minus_one)
    assert error_of("paper-delta") > 1e-3


def test_rows_mixed(monkeypatch):
    """One memory for the whole batch."""
    original = PaperLinear.read_and_write

    def mixed(self, state, q, k, *others):
        return original(self, state, q, k.mean(dim=0, keepdim=True).expand_as(k), *others)

    monkeypatch.setattr(PaperLinear, "read_and_write", mixed)
    assert error_of("paper-linear") > 1e-3


def test_memory_reset_on_every_call():
    def plant(model):
        right = model.forward
        model.forward = lambda *args, memory, **kwargs: right(*args, memory=model.init_memory(3), **kwargs)

    assert error_of("paper-linear", plant) > 1e-3


def test_memory_shared_between_layers():
    def plant(model):
        right = model.model.layers[1].forward
        first = model.model.layers[0].forward
        seen = {}

        def remember(x, memory, *rest):
            x, seen["memory"], density = first(x, memory, *rest)
            return x, seen["memory"], density

        model.model.layers[0].forward = remember
        model.model.layers[1].forward = lambda x, memory, *rest: right(x, seen["memory"], *rest)

    assert error_of("paper-linear", plant) > 1e-3


def test_detaching_every_segment(monkeypatch):
    """No back-propagation through the memory: gradients of the first segment's keys and values vanish."""

    def reached() -> float:
        model = build("paper-linear")
        x = model.model.embed_tokens(rows("one document")[0]).detach().requires_grad_()
        model(inputs_embeds=x).logits[:, -1].sum().backward()
        return x.grad[:, :6].abs().max().item()

    assert reached() > 0
    right = paper_rules.scan
    monkeypatch.setattr(paper_rules, "scan", lambda *args: right(*args).detach())
    assert reached() == 0
