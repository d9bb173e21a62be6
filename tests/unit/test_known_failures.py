"""Warnings at start: each fires where it should and nowhere else, and what it says of gradients is so."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.configuration import MEMORY_RULES
from infini_train.training.known_failures import known_failures
from infini_train.training.optim import OptimizerOptions

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TINY = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
S = 32
LONG = [5 * S, 40 * S]


def options_of(
    tokens: list[int], memory="selective-delta", gate_lr=1e-2, segments=16, size=S, write_cost=0.0
) -> set[str]:
    """The options that are complained of."""
    config = InfiniConfig(**TINY, memory=memory, segment_length=size)
    found = known_failures(
        config,
        OptimizerOptions(gate_lr=gate_lr),
        segments_per_window=segments,
        write_cost=write_cost,
        tokens_D=np.array(tokens, np.int64),
    )
    assert all("docs/memory.md" in line and "\n" not in line for line in found)
    return {line.split(":")[0] for line in found}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, set()),
        ({"segments": 1}, {"data.segments_per_window"}),
        ({"segments": 2}, set()),
        ({"gate_lr": 0.0}, {"model.optimizer.gate_lr"}),
        ({"gate_lr": 1e-5}, set()),
        ({"tokens": [S] * 4}, {"data.segment_length"}),
        ({"tokens": [S + 1] * 4}, set()),
        # By tokens, not by documents: a book outweighs a hundred notes, but not a hundred and one.
        ({"tokens": [S] * 100 + [100 * S]}, set()),
        ({"tokens": [S] * 101 + [100 * S]}, {"data.segment_length"}),
        (
            {"tokens": [2], "segments": 1, "gate_lr": 0.0},
            {"data.segments_per_window", "model.optimizer.gate_lr", "data.segment_length"},
        ),
    ],
)
@pytest.mark.parametrize("memory", MEMORY_RULES)
def test_known_failures(memory, case, expected):
    assert options_of(**{"tokens": LONG, "memory": memory, **case}) == expected


@pytest.mark.parametrize("case", [{}, {"segments": 1}, {"gate_lr": 0.0}], ids=str)
@pytest.mark.parametrize("memory", MEMORY_RULES)
def test_a_cost_of_writing_that_teaches_nothing(memory, case):
    without = options_of(LONG, memory, **case)
    useless = memory != "selective-delta" or case != {}
    assert options_of(LONG, memory, write_cost=0.3, **case) == without | ({"model.write_cost"} if useless else set())


@pytest.mark.parametrize("memory", MEMORY_RULES)
def test_a_rule_that_chooses_its_writes_reports_them(memory):
    model = InfiniForCausalLM(InfiniConfig(**TINY, memory=memory, segment_length=4)).train()
    layer, found = model.model.layers[0].self_attn.rule, []
    layer.register_forward_hook(lambda rule, given, output: found.append(output))
    model(torch.randint(16, (1, 8)))
    assert (found[-1].strengths is not None) == type(layer).chooses_writes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_not_complained_of(path):
    """With documents from a short story to a book, as README has them prepared."""
    options = yaml.safe_load(path.read_text())
    model, data = options["model"], options["data"]
    tokens = [5_000, 20_000, 100_000] if path.stem != "recall" else [512, 1024, 1536, 2048]  # memory_report's
    assert (
        options_of(
            tokens,
            model.get("memory", "paper-linear"),
            OptimizerOptions(**model["optimizer"]).gate_lr,
            data["segments_per_window"],
            data["segment_length"],
        )
        == set()
    )


@pytest.mark.parametrize("segments", [1, 2])
def test_one_segment_a_window_teaches_no_writing(segments):
    torch.manual_seed(0)
    config = InfiniConfig(**TINY, memory="selective-delta", segment_length=4)
    model = InfiniForCausalLM(config)
    ids = torch.randint(16, (1, 4 + 4 * segments))
    with torch.no_grad():
        memory = model.model(ids[:, :4]).memory
    model(ids[:, 4:], labels=ids[:, 4:], memory=memory).loss.backward()
    rule = model.model.layers[0].self_attn.rule
    learned = {name for name, p in rule.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    reads = {"conv", "gate_weight", "read_norm", "base"}
    writes = {"strength_weight", "strength_bias", "forget"}
    # (The convolution of keys is taught by local attention, too.)
    assert learned == (reads if segments == 1 else reads | writes)
