"""PEFT's adapters on an export: on which layers they are by default, and what comes of saving and merging them."""

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import infini_train.hf  # noqa: F401 (the Auto classes and PEFT's default targets)
from tests.helpers.exports import tiny_export

IDS = torch.randint(3, 288, (2, 37), generator=torch.Generator().manual_seed(3))
PROJECTIONS = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def adapted_layers(model: nn.Module) -> set[str]:
    """Names within a layer of the modules with an adapter, as every layer has them; names outside of layers whole."""
    names = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    return {name.partition("model.model.layers.")[2].partition(".")[2] or name for name in names}


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (LoraConfig(), {"self_attn.q_proj", "self_attn.v_proj"}),
        (LoHaConfig(), {"self_attn.q_proj", "self_attn.v_proj"}),
        (IA3Config(), {"self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"}),
    ],
)
def test_default_targets_are_those_of_a_llama(tmp_path: Path, config, targets: set[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_export(tmp_path / "export", memory="selective-delta"))
    assert adapted_layers(get_peft_model(model, config)) == targets


@pytest.mark.parametrize("output_memory_dim", [None, 4])
def test_adapters_on_all_linear_layers(tmp_path: Path, output_memory_dim: int | None) -> None:
    """They are on the projections, and neither on the head nor on gates and memories. The model is that with
    W + alpha / r B A; so is what is saved and loaded again, merged, and saved merged."""
    memory = {"memory": "selective-delta", "sliding_window": 8, "output_memory_dim": output_memory_dim}
    export = tiny_export(tmp_path / "export", **memory)
    model, expected = (AutoModelForCausalLM.from_pretrained(export).eval() for _ in range(2))
    plain = expected(IDS).logits
    options = {"r": 2, "lora_alpha": 6, "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options))
    assert adapted_layers(adapted) == PROJECTIONS
    for name, module in adapted.named_modules():
        if hasattr(module, "base_layer"):
            layer = expected.get_submodule(name.removeprefix("base_model.model."))
            layer.weight.data += 3 * module.lora_B["default"].weight.data @ module.lora_A["default"].weight.data
    logits = expected(IDS).logits
    assert (logits - plain).abs().max() > 0.1
    torch.testing.assert_close(adapted(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    adapted(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path / "adapter")
    assert sorted(f.name for f in (tmp_path / "adapter").iterdir() if f.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for loaded in (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(export), tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(loaded.eval()(IDS).logits, adapted(IDS).logits)
    ask = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(adapted.generate(input_ids=IDS, **ask), expected.generate(IDS, **ask))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(IDS).logits, merged(IDS).logits)


def test_an_adapter_on_the_output_weights_beside_an_output_memory_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_export(tmp_path / "export", output_memory_dim=4))
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="lm_head: found an adapter on output weights"):
        adapted(IDS)
