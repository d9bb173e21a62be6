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
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"output_memory_dim": 7},
        {"qk_norm": True},
        {"memory": "selective-delta", "memory_base": False},
    ],
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
    # A triangular system needs half of a product, with its backward three halves; by its inverse it takes two whole
    # ones. (Torch counts none for the inverse itself, of blocks as small as these.)
    systems = (2 * 2 - 3) * c.segment_length * c.num_key_value_heads * c.head_dim * c.num_hidden_layers
    systems *= memory == "selective-delta"
    # The gradient of a norm's weight is a sum over tokens, done as a product with a vector.
    norms = 2 * c.hidden_size * (2 * c.num_hidden_layers + 1)
    norms += 2 * c.num_attention_heads * c.head_dim * c.num_hidden_layers * (memory == "selective-delta")
    assert measured == pytest.approx(flops_per_token(c) - attention + systems + norms, rel=1e-3)


def test_flops_of_an_output_memory():
    """Against torch's count of the products, beside the same model without one."""

    def measured(c: InfiniConfig) -> float:
        model, ids = InfiniForCausalLM(c), torch.randint(c.vocab_size, (1, 8 * c.segment_length))
        with FlopCounterMode(display=False) as counter:
            model.token_losses(ids, ids).total.backward()
        return counter.get_total_flops() / ids.numel()

    plain, c = config(), config(output_memory_dim=7)
    # The last token of a chunk is not written, and the features' bias takes a sum over tokens in backward.
    last = 2 * 7 * c.vocab_size / c.segment_length
    # torch does not count products in place, with which both heads add up the gradient of their weight.
    expected = flops_per_token(c) - flops_per_token(plain) - last
    assert measured(c) - measured(plain) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("sliding", [1, 5, 16, 21, 32])
def test_flops_of_a_sliding_window(sliding):
    """Local attention counts the keys that a token far from its document's start sees."""
    plain, c = config(), config(sliding_window=sliding)
    size, heads = c.segment_length, c.num_attention_heads * c.head_dim
    seen = sum(sum(t - u < sliding for u in range(-min(sliding, size), t + 1)) for t in range(size)) / size
    own = (size + 1) / 2
    more = 3 * c.num_hidden_layers * 4 * heads * (seen - own)
    assert flops_per_token(c) - flops_per_token(plain) == pytest.approx(more)
