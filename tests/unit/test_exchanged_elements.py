"""What a rule says it exchanges under context parallelism is what it hands to the collective."""

import pytest
import torch
import torch.distributed as dist

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.context import ContextGroup
from infini_train.model.flops import exchanged_elements
from infini_train.model.rules import RULES

S, ROWS, LAYERS = 8, 3, 2


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sliding_window", [None, 5, 2 * S])
def test_exchanged_elements(monkeypatch, name, sliding_window):
    counted = 0

    def gather(self, *parts):
        nonlocal counted
        counted += sum(part.numel() for part in parts)
        return [parts]

    monkeypatch.setattr(ContextGroup, "gather", gather)
    monkeypatch.setattr("infini_train.model.context.get_rank", lambda group: 0)
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "segment_length": S}
    model = InfiniForCausalLM(InfiniConfig(**sizes, **heads, memory=name, sliding_window=sliding_window)).train()
    model.model(torch.zeros(ROWS, 4 * S, dtype=torch.long), context=ContextGroup(dist.GroupMember.WORLD))
    once = ROWS * (model.config.near_length + 1 if sliding_window else 0)  # which tokens are of the same document
    assert counted == ROWS * LAYERS * exchanged_elements(model.config) + once
