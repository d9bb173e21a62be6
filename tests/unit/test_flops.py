"""The closed forms against the built model and against torch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.flops import flops_per_token, parameters


def config(**options) -> InfiniConfig:
    fields = dict(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        segment_length=16,
    )
    return InfiniConfig(**{**fields, **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 32}],
)
def test_parameters(options):
    model = InfiniForCausalLM(config(**options))
    assert parameters(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("memory", ["paper-linear", "paper-delta", "selective-delta"])
def test_flops(memory):
    c = config(memory=memory)
    model, segments = InfiniForCausalLM(c), 64
    ids = torch.randint(c.vocab_size, (1, segments * c.segment_length))
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    measured = counter.get_total_flops() / ids.numel()
    # torch counts no FLOPs for attention on CPU: check the rest exactly, and attention by its own closed form.
    attention = 3 * c.num_hidden_layers * 4 * c.num_attention_heads * c.head_dim * (c.segment_length + 1) / 2
    # Triangular systems count as S rows of S / 2 on average and d columns, three times. They are solved by the whole
    # inverse, S x S, twice, which is made of blocks of 8 by four products, and joined in pairs by two.
    size, layers = c.segment_length, c.num_hidden_layers * c.num_key_value_heads
    blocks = 4 * 2 * 8**3 * size // 8 + sum(2 * 2 * half**3 * size // (2 * half) for half in (8, 16) if half < size)
    systems = layers * (3 * size * c.head_dim - 2 * 2 * size * c.head_dim - blocks / size)
    systems *= memory == "selective-delta"
    assert measured == pytest.approx(flops_per_token(c) - attention - systems, rel=1e-3)
