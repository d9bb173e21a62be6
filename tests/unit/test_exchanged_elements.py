"""What a rank exchanges and holds under context parallelism: what `plan` counts, whatever the number of ranks."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.flops import exchanged_elements
from infini_train.model.rules import RULES
from tests.helpers.rank_threads import Ranks, ThreadContext

S, ROWS, LAYERS = 8, 3, 2
KINDS = pytest.mark.parametrize(("name", "sliding_window"), [(name, n) for name in RULES for n in (None, 5, 2 * S)])


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def pass_of(group: ThreadContext, models: list[InfiniForCausalLM]) -> tuple[int, int, int, int]:
    """Elements that a rank has sent in a forward pass, and has sent and received after backward; its largest
    tensor."""
    with Largest() as largest:
        out = models[group.rank].model(torch.zeros(ROWS, 4 * S, dtype=torch.long), context=group)
        forward = sum(x.numel() for x in group.sent)
        out.last_hidden_state.sum().backward()
    return forward, *(sum(x.numel() for x in tensors) for tensors in (group.sent, group.received)), largest.elements


def passes(name: str, sliding_window: int | None, ranks: int) -> tuple[InfiniConfig, list[tuple[int, int, int, int]]]:
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "segment_length": S}
    config = InfiniConfig(**sizes, **heads, memory=name, sliding_window=sliding_window)
    models = [InfiniForCausalLM(config).train() for _ in range(ranks)]
    return config, Ranks(ranks).run(lambda group: pass_of(group, models))


@KINDS
def test_exchanged_elements(name, sliding_window):
    """A rank sends the state of each layer to the next rank, and the last one to the first."""
    config, found = passes(name, sliding_window, 3)
    *others, last = (forward for forward, *_ in found)
    assert last == ROWS * LAYERS * exchanged_elements(config)
    # Which of the carried tokens are of the same document is the same in all layers, and sent once.
    assert set(others) == {last - ROWS * (LAYERS - 1) * config.near_length}


@KINDS
def test_neither_bytes_nor_tensors_grow_with_the_ranks(name, sliding_window):
    """The busiest rank of 8 sends, receives and holds exactly what that of 2 does."""
    few, many = (passes(name, sliding_window, ranks)[1] for ranks in (2, 8))
    busiest = [[max(of_ranks) for of_ranks in zip(*found, strict=True)] for found in (few, many)]
    assert busiest[0] == busiest[1] and all(busiest[0])
