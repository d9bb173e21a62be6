"""First weights have the spread that the options say."""

import pytest
import torch

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.training.module import InfiniModule

SIZES = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


@pytest.mark.parametrize(("given", "embeddings"), [(None, 0.1), (1.0, 1.0)])
def test_spread_of_embeddings_and_matrices(given, embeddings):
    module = InfiniModule(
        **SIZES, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1, embedding_range=given
    )
    module.configure_model()
    spread = {n: p.std().item() for n, p in module.model.named_parameters() if p.dim() > 1 and ".rule." not in n}
    assert spread.pop("model.embed_tokens.weight") == pytest.approx(embeddings, rel=0.03)
    assert spread["lm_head.weight"] == pytest.approx(0.1, rel=0.03)
    assert spread == pytest.approx(dict.fromkeys(spread, 0.1), rel=0.05)


def test_tied_embeddings_have_one_spread():
    with pytest.raises(ValueError, match=r"embedding_range: found 1\.0, expected none where embeddings are tied"):
        InfiniConfig(**SIZES, num_attention_heads=2, tie_word_embeddings=True, embedding_range=1.0)


@pytest.mark.parametrize("spread", [0.02, 0.125])
def test_reads_begin_as_large_as_values(spread):
    """Else what the memory holds at first, noise, drowns local attention."""
    torch.manual_seed(0)
    config = InfiniConfig(
        **SIZES, num_attention_heads=2, memory="selective-delta", segment_length=8, initializer_range=spread
    )
    model, seen = InfiniForCausalLM(config), {}
    attention = model.model.layers[0].self_attn
    attention.mix.register_forward_hook(lambda module, inputs, output: seen.update(read=inputs[1]))
    attention.v_proj.register_forward_hook(lambda module, inputs, output: seen.update(value=output))
    with torch.no_grad():
        model(torch.randint(500, (4, 64)))
    read, value = (seen[name].square().mean().sqrt().item() for name in ("read", "value"))
    assert read == pytest.approx(value, rel=0.1)
