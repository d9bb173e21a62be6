"""Offloaded weights and adapters on the memory rule: what accelerate and PEFT do around a module's forward works."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import infini_train.hf  # noqa: F401 (the Auto classes)
from infini_train.model.rules import RULES
from tests.helpers.exports import tiny_export

IDS = torch.arange(3, 60)[None]
PLACES = {
    **{"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"},
    **{"model.rotary_emb": "cpu", "lm_head": "disk"},
}


def load(export: Path, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(export, **options).eval()


@pytest.mark.parametrize(("memory", "output"), [*((memory, None) for memory in RULES), ("selective-delta", 4)])
def test_offloaded_weights_give_the_same_logits_and_tokens(tmp_path: Path, memory: str, output: int | None) -> None:
    export = tiny_export(tmp_path / "export", memory=memory, sliding_window=8, output_memory_dim=output)
    ask = {"input_ids": IDS, "max_new_tokens": 12, "do_sample": False}
    model = load(export)
    with torch.no_grad():
        logits, tokens = model(IDS).logits, model.generate(**ask)
        for offloaded in (
            load(export, device_map=PLACES, offload_folder=tmp_path / "folder"),
            cpu_offload(load(export), execution_device="cpu"),
            disk_offload(load(export), str(tmp_path / "disk"), execution_device="cpu"),
        ):
            assert any(p.device.type == "meta" for p in offloaded.model.layers[1].self_attn.parameters())
            assert torch.equal(offloaded(IDS).logits, logits)
            assert torch.equal(offloaded.generate(**ask), tokens)


def test_adapters_on_parameters_of_the_rule(tmp_path: Path) -> None:
    """Their output, and that of the merged model, is the output with W + alpha / r B A."""
    export = tiny_export(tmp_path / "export", memory="selective-delta")
    options = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, "target_modules": []}
    adapted = get_peft_model(load(export), LoraConfig(target_parameters=["rule.strength_weight"], **options))
    expected = load(export)
    for wrapped, layer in zip(adapted.model.model.layers, expected.model.layers, strict=True):
        rule = wrapped.self_attn.rule
        with torch.no_grad():
            layer.self_attn.rule.strength_weight += 3 * rule.lora_B["default"].weight @ rule.lora_A["default"].weight
    logits = expected(IDS).logits
    assert (logits - load(export)(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(adapted(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    adapted(IDS).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, logits, rtol=1e-5, atol=1e-5)
