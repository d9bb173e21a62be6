"""torchao's int8 weights in an export: the model is that whose weights were rounded by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

import infini_train.hf  # noqa: F401 (the Auto classes)
from tests.helpers.exports import tiny_export

IDS = torch.arange(3, 60)[None]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """The weight rounded to whole multiples, from -128 to 127, of a 127.5th of each row's largest magnitude."""
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    return (weight * (1 / scale)).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("memory", ["paper-delta", "selective-delta"])
def test_int8_weights(tmp_path: Path, memory: str) -> None:
    export = tiny_export(tmp_path / "export", memory=memory, sliding_window=8)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(export, quantization_config=config).eval()
    by_hand = AutoModelForCausalLM.from_pretrained(export).eval()
    exact = by_hand(IDS, use_cache=False).logits
    layers = [m for name, m in by_hand.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    assert len(layers) == 2 * 7, "the projections; neither embeddings nor the memory rule"
    for layer in layers:
        layer.weight.data = rounded(layer.weight.data)
    expected, found = (m(IDS, use_cache=False).logits for m in (by_hand, quantised))
    assert (expected - exact).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ask = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(quantised.generate(IDS, **ask), by_hand.generate(IDS, **ask))
    quantised.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(saved(IDS, use_cache=False).logits, found)
