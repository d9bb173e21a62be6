"""The rules' parallel form against the naive loops that stand beside them, in float64."""

import pytest
import torch

from infini_train.model import InfiniConfig, naive
from infini_train.model.rules import RULES
from infini_train.model.window import Window

N, S, D = 5, 70, 8  # a segment of selective-delta has two chunks, the second one incomplete
NO_ROPE = torch.empty(0), torch.empty(0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_parallel_form_equals_the_loop(monkeypatch, name, as_on_gpu):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": D, "intermediate_size": 8, "num_hidden_layers": 1}
    config = InfiniConfig(**sizes, num_attention_heads=1, head_dim=D, segment_length=S, memory=name)
    rule = RULES[name](config).double()
    monkeypatch.setattr(rule, "as_on_gpu", as_on_gpu)
    q, k, v = (torch.randn(N, S, D, dtype=torch.float64) for _ in range(3))
    logits = torch.randn(N, S, dtype=torch.float64)
    state = {key: x.double() for key, x in rule.init_state(config, 1).items()}
    features = {"strength_logit": logits.reshape(1, N * S, 1)}
    out = rule.read_and_write(
        state, q[None, :, None, None], k[None, :, None], v[None, :, None], features, Window(N, NO_ROPE, NO_ROPE)
    )
    if name == "selective-delta":
        w = (1.2 * logits.sigmoid() - 0.1).clamp(0, 1)
        expected = naive.selective_delta(q, k, v, w, rule.decay_rate()[0], rule.base[0], rule.read_norm)
    else:
        expected = naive.paper_rule(q, k, v, delta=name == "paper-delta")
        assert out.known.flatten().tolist() == [False] + [True] * (N - 1)
        expected[0] = 0
    torch.testing.assert_close(out.read[0, :, 0, 0] * out.known[0, :, 0, 0], expected, rtol=1e-10, atol=1e-10)
