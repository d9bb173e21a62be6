"""Muon with AdamW as one optimizer, against torch's two optimizers side by side; in pieces, against the whole."""

import threading

import pytest
import torch
from torch import Tensor

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.training.fragments import Fragment
from infini_train.training.muon import HIDDEN, Matrix, MuonWithAdamW
from infini_train.training.optim import OptimizerOptions, build
from tests.helpers.rank_threads import Ranks

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPTIONS = {"lr": 0.02, "gate_lr": 0.05, "weight_decay": 0.3, "warmup_steps": 0, "schedule": "wsd", "decay_steps": 0}
MUON = {"momentum": 0.95, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"}


@pytest.mark.parametrize("muon_lr", [None, 0.05])
def test_it_is_torchs_muon_for_projections_and_adamw_for_the_rest(muon_lr):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = InfiniConfig(vocab_size=10, num_hidden_layers=2, memory="selective-delta", output_memory_dim=3, **sizes)
    model = InfiniForCausalLM(config)
    optimizer, _ = build(model, OptimizerOptions(name="muon", muon_lr=muon_lr, **OPTIONS), max_steps=10)
    twin = InfiniForCausalLM(config)
    twin.load_state_dict(model.state_dict())
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    hidden = [p for name, p in theirs.items() if any(f"{kind}.weight" in name for kind in PROJECTIONS)]
    assert len(hidden) == 2 * len(PROJECTIONS)
    muon = torch.optim.Muon(hidden, lr=muon_lr or 0.02, **MUON)
    others = build(twin, OptimizerOptions(**OPTIONS), max_steps=10)[0]
    for group in others.param_groups:
        group["params"] = [p for p in group["params"] if not any(p is q for q in hidden)]

    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for name, p in ours.items():
            p.grad = torch.randn(p.shape, generator=generator)
            if step == 2 and "layers.0" in name:  # a step without a gradient leaves weight and momentum as they are
                p.grad = None
            theirs[name].grad = p.grad
        for each in (optimizer, muon, others):
            each.step()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    for p, q in zip(optimizer.param_groups[3]["params"], hidden, strict=True):
        assert optimizer.state[p].keys() == {"momentum_buffer"}
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], muon.state[q]["momentum_buffer"])


def test_its_state_is_saved_and_loaded():
    """As under DDP, where Lightning loads torch's state dictionary: two steps, against one before and one after."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config, found = InfiniConfig(vocab_size=10, num_hidden_layers=1, **sizes), []
    for stops in (False, True):
        model = InfiniForCausalLM(config)
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p)
        optimizer, _ = build(model, OptimizerOptions(name="muon", **OPTIONS), max_steps=10)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            optimizer.step()
            if stops:
                saved = optimizer.state_dict()
                optimizer, _ = build(model, OptimizerOptions(name="muon", **OPTIONS), max_steps=10)
                optimizer.load_state_dict(saved)
        found.append([p.detach() for p in model.parameters()])
    for unbroken, resumed in zip(*found, strict=True):
        assert torch.equal(unbroken, resumed)


SHAPES = [(6, 10), (3, 3), (8, 2), (5, 7)]
Cuts = list[list[tuple[int, int] | None]]  # by rank and matrix: the first element of a piece, and the one after it


def slices_of_a_group(ranks: int) -> Cuts:
    """As ZeRO-1 and 2 partition: equal slices of all parameters in a row.."""
    size = -(-sum(r * c for r, c in SHAPES) // ranks)
    found, begin = [], 0
    for r, c in SHAPES:
        cuts = [(max(0, rank * size - begin), min(r * c, (rank + 1) * size - begin)) for rank in range(ranks)]
        found.append([cut if cut[0] < cut[1] else None for cut in cuts])
        begin += r * c
    return [list(of_rank) for of_rank in zip(*found, strict=True)]


def slices_of_each(ranks: int) -> Cuts:
    """As ZeRO-3 partitions: an equal slice of every parameter for each rank, the last ones padded."""
    found = []
    for r, c in SHAPES:
        size = -(-r * c // ranks)
        cuts = [(rank * size, min(r * c, (rank + 1) * size)) for rank in range(ranks)]
        found.append([cut if cut[0] < cut[1] else None for cut in cuts])
    return [list(of_rank) for of_rank in zip(*found, strict=True)]


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("slices", [slices_of_a_group, slices_of_each])
def test_pieces_of_matrices_are_updated_as_the_whole(monkeypatch, slices, ranks):
    torch.manual_seed(0)
    whole = [torch.randn(shape) for shape in SHAPES]
    gradients = [[torch.randn(shape) for shape in SHAPES] for _ in range(3)]
    cuts = slices(ranks)
    holders = [sum(of_rank[i] is not None for of_rank in cuts) for i in range(len(SHAPES))]
    local = threading.local()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: local.context.sum_(x))

    def train(context) -> list[Tensor]:
        local.context = context
        mine = cuts[context.rank]

        def flat(tensors: list[Tensor]) -> Tensor:
            parts = [x.flatten()[slice(*cut)] for x, cut in zip(tensors, mine, strict=True) if cut is not None]
            return torch.cat(parts) if parts else torch.zeros(1)

        partition, offset, matrices = flat(whole), 0, []
        for i, (shape, cut) in enumerate(zip(SHAPES, mine, strict=True)):
            fragment = None if cut is None else Fragment(str(i), cut[0], partition, offset, cut[1] - cut[0])
            offset += 0 if cut is None else cut[1] - cut[0]
            matrices.append(Matrix(shape, fragment, holders[i] > 1))
        group = {"name": HIDDEN, "params": [partition], "lr": 0.02, "weight_decay": 0.3}
        other = {"name": "gates", "params": [torch.zeros(1)], "lr": 0.0, "weight_decay": 0.0}
        optimizer = MuonWithAdamW([group, other], (0.9, 0.95), 1e-8)
        optimizer.matrices = {partition: matrices}
        for step in gradients:
            partition.grad = flat(step)
            optimizer.step()
        return [None if m.fragment is None else m.fragment.of(partition) for m in matrices]

    found = Ranks(ranks).run(train)
    expected = [x.clone() for x in whole]
    muon = torch.optim.Muon(expected, lr=0.02, **MUON)
    for step in gradients:
        for p, gradient in zip(expected, step, strict=True):
            p.grad = gradient
        muon.step()
    for i, p in enumerate(expected):
        pieces = [of_rank[i] for of_rank in found if of_rank[i] is not None]
        torch.testing.assert_close(torch.cat(pieces), p.flatten(), rtol=1e-5, atol=1e-6)


def test_a_wrong_rate_is_named():
    (wrong,) = OptimizerOptions(name="muon", muon_lr=-1.0).wrong()
    assert "model.optimizer.muon_lr: found -1.0, expected at least 0, or none" in wrong
    (wrong,) = OptimizerOptions(muon_lr=1.0).wrong()
    assert "model.optimizer.muon_lr: found 1.0, expected none with name: adamw" in wrong
