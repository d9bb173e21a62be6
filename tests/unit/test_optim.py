"""Parameter groups and schedules against hand-written values."""

import math

import pytest
import torch

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.training.optim import OptimizerOptions, build, parameter_groups, schedule

SIZES = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}


def tiny(layers: int) -> InfiniForCausalLM:
    return InfiniForCausalLM(InfiniConfig(**SIZES, num_hidden_layers=layers))


def test_every_parameter_is_in_its_group():
    config = InfiniConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    model = InfiniForCausalLM(config)
    groups = {g["name"]: g for g in parameter_groups(model, OptimizerOptions(lr=1.0, gate_lr=2.0, weight_decay=0.5))}
    names = {id(p): name for name, p in model.named_parameters()}
    found = {name: {names[id(p)].split("layers.")[-1] for p in g["params"]} for name, g in groups.items()}
    assert found["gates"] == {"0.self_attn.gate", "1.self_attn.gate"}
    norms = {f"{i}.{n}.weight" for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")}
    assert found["vectors"] == {*norms, "model.norm.weight", "model.embed_tokens.weight"}
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "matrices": (1.0, 0.5),
        "vectors": (1.0, 0.0),
        "gates": (2.0, 0.0),
    }


def undecayed(version: int, **config) -> set[str]:
    """Names of the parameters with two or more dimensions that do not decay."""
    model = InfiniForCausalLM(InfiniConfig(**SIZES, num_hidden_layers=1, **config))
    options = OptimizerOptions(weight_decay=0.5)
    options.version = version
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [g["params"] for g in parameter_groups(model, options) if g["weight_decay"] == 0]
    return {names[id(p)].split("rule.")[-1] for params in groups for p in params if p.dim() > 1}


def test_embeddings_and_the_start_of_the_memory_do_not_decay():
    """Unless the embeddings are the output matrix as well, or the run began when they still did."""
    rule = {"gate_weight", "strength_weight", "conv"}
    assert undecayed(1, memory="selective-delta") == {*rule, "base", "model.embed_tokens.weight"}
    assert undecayed(1, memory="selective-delta", tie_word_embeddings=True) == {*rule, "base"}
    assert undecayed(0, memory="selective-delta") == rule
    assert undecayed(0) == set()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "cosine"}, {0: 0.25, 3: 1.0, 4: 1.0, 12: 0.55, 20: 0.1, 99: 0.1}),
        ({"schedule": "wsd", "decay_steps": 10}, {0: 0.25, 4: 1.0, 10: 1.0, 15: 0.55, 20: 0.1, 99: 0.1}),
        ({"schedule": "wsd", "decay_steps": 0}, {0: 0.25, 4: 1.0, 20: 1.0}),
        ({"schedule": "cosine", "final_lr": 0.0}, {8: (1 + math.cos(math.pi / 4)) / 2, 20: 0.0}),
    ],
)
@pytest.mark.parametrize("version", [0, 1])
def test_schedule(options, expected, version):
    """The last of 21 steps, step 20, has final_lr; a run of the old version reached it one step later."""
    options = OptimizerOptions(warmup_steps=4, **{"final_lr": 0.1, **options})
    options.version = version
    share = schedule(options, max_steps=20 + version)
    assert {step: share(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(5, 2), (3, 2), (1000, 100), (2, 0), (1, 0)])
def test_the_last_step_has_final_lr_exactly(name, steps, warmup):
    options = OptimizerOptions(schedule=name, warmup_steps=warmup, decay_steps=2, final_lr=0.1)
    assert schedule(options, steps)(steps - 1) == 0.1


def test_gates_move_at_their_own_rate():
    config = InfiniConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = InfiniForCausalLM(config)
    optimizer, _ = build(model, OptimizerOptions(lr=1e-4, gate_lr=1e-2, warmup_steps=1), max_steps=10)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters()}
    assert moved["model.layers.0.self_attn.gate"] == pytest.approx(1e-2, rel=1e-4)  # Adam's first step is lr
    assert moved["model.norm.weight"] == pytest.approx(1e-4, rel=1e-2)


def test_all_wrong_values_are_named():
    found = OptimizerOptions(lr=-1, warmup_steps=-2, eps=math.nan, betas=(0.9, 1.0)).wrong()
    assert len(found) == 4
    assert "lr: found -1" in found[0]
    assert "eps: found nan" in found[1]
    assert "warmup_steps: found -2" in found[2]
    assert "betas: found (0.9, 1.0)" in found[3]
