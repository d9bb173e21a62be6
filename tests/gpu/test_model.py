"""The decoder on a GPU against itself on a CPU in float64, which the other tests compare with plain loops."""

from contextlib import nullcontext

import pytest
import torch

from infini_train.model import InfiniConfig, InfiniForCausalLM
from tests.helpers.models import OUTPUT, RULES

SEGMENT, SEGMENTS, VOCABULARY = 128, 4, 300
SLIDING = " + sliding"  # after the name of a rule: local attention also sees the whole segment before
MODELS = (*RULES, "paper-linear" + SLIDING, "selective-delta" + SLIDING + OUTPUT)
# Rows of 512 tokens: documents that begin inside segments, at their borders, several in one.
STARTS = {"one document": [[], []], "documents": [[100], [256, 300, 301, 500]]}


def build(memory: str) -> InfiniForCausalLM:
    torch.manual_seed(0)
    memory, plus, _ = memory.partition(OUTPUT)
    memory, sliding, _ = memory.partition(SLIDING)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    options: dict = {"segment_length": SEGMENT, "memory": memory, "output_memory_dim": 32 if plus else None}
    options["sliding_window"] = 2 * SEGMENT if sliding else None
    return InfiniForCausalLM(InfiniConfig(**sizes, **heads, **options)).train()


def rows(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    starts = torch.zeros(2, SEGMENT * SEGMENTS, dtype=torch.bool)
    for row, at in enumerate(STARTS[case]):
        starts[row, at] = True
    return torch.randint(VOCABULARY, starts.shape), starts


def losses_of(model: InfiniForCausalLM, ids: torch.Tensor, starts: torch.Tensor) -> list[torch.Tensor]:
    """Losses, memories after the window and gradients, each flat, float64, on the CPU."""
    out = model.token_losses(ids.to(model.device), ids.to(model.device), starts)
    out.total.backward()
    memories = [x for layer in out.memory for x in layer.values()]
    found = ([out.losses], memories, [p.grad for p in model.parameters()])
    return [torch.cat([x.detach().cpu().double().flatten() for x in part]) for part in found]


@pytest.mark.parametrize("memory", MODELS)
@pytest.mark.parametrize("case", STARTS)
@pytest.mark.parametrize(("precision", "tolerances"), [("32-true", (1e-5,) * 3), ("bf16-mixed", (1e-2, 2e-2, 1e-1))])
def test_gpu_equals_float64(memory, case, precision, tolerances):
    ids, starts = rows(case)
    expected = losses_of(build(memory).double(), ids, starts)
    mixed = torch.autocast("cuda", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    with mixed:
        found = losses_of(build(memory).cuda(), ids, starts)
    for a, b, tolerance in zip(found, expected, tolerances, strict=True):
        assert (a - b).norm() / b.norm() < tolerance


@pytest.mark.parametrize("memory", MODELS)
@pytest.mark.parametrize("case", STARTS)
def test_nothing_in_a_step_waits_for_the_gpu(memory, case):
    model = build(memory).cuda()
    ids, starts = rows(case)
    ids = ids.cuda()
    for mode in ("default", "error"):  # libraries may wait once, to set themselves up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                total = model.token_losses(ids, ids, starts).total
            total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("memory", MODELS)
def test_generation_equals_that_on_a_cpu(memory):
    model = build(memory).eval()
    torch.manual_seed(2)
    ids, mask = torch.randint(VOCABULARY, (2, 300)), torch.ones(2, 300, dtype=torch.long)
    mask[1, :77] = 0
    options = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)
    found = model.cuda().generate(ids.cuda(), attention_mask=mask.cuda(), **options)
    assert torch.equal(found.cpu(), expected)
