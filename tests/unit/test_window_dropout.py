"""Steps of training in which the memories of the layers are all that is read of earlier segments."""

import pytest
import torch

from infini_train.data.index import DatasetIndex
from infini_train.evaluation.subject import load
from infini_train.run_files import latest
from infini_train.training import draws
from infini_train.training.chunks import window_losses
from infini_train.training.draws import window_dropped
from infini_train.training.lane_memory import LaneMemory
from infini_train.training.module import InfiniModule
from tests.helpers.datasets import make_dataset
from tests.helpers.models import MODELS, OUTPUT, STARTS, S, build, rows
from tests.helpers.runs import fit

LANES, WINDOW, STEPS = 4, 32, 6
CASES = [(memory, sliding) for memory, sliding in MODELS if sliding is not None or OUTPUT in memory]


@pytest.mark.parametrize(("memory", "sliding"), CASES)
@pytest.mark.parametrize("case", STARTS)
@pytest.mark.parametrize("chunk", [None, 1])
def test_such_a_window_reads_the_memories_of_the_layers_alone(memory, sliding, case, chunk):
    """Losses, gradients and the output memory are those of a model without a sliding window whose output memory is
    not added to the logits; and the first layer, whose inputs are the same, carries the same as ever."""
    ids, starts = rows(case, 4 * S)
    found, states = [], []
    for width, own_segment, scaled in ((sliding, True, True), (None, False, False), (sliding, False, True)):
        model = build(memory, sliding_window=width).train()
        if model.has_output_memory and not scaled:
            torch.nn.init.zeros_(model.lm_head.memory.scale)
        options = {"starts": starts, "segments_per_chunk": chunk, "own_segment": own_segment}
        out = window_losses(model, ids, ids.roll(-1, 1), **options)
        out.total.backward()
        states.append(out.memory)
        found.append((out.losses, {name: p.grad for name, p in model.named_parameters()}))
    dropped, none, ever = found
    if OUTPUT in memory:
        assert dropped[1].pop("lm_head.memory.scale") == 0  # and not None, so that ranks can add it up
        none[1].pop("lm_head.memory.scale")
        torch.testing.assert_close(states[0][-1], states[1][-1], rtol=1e-4, atol=1e-4)
        assert states[0][-1]["output"].abs().max() > 0.1
    torch.testing.assert_close(dropped, none, rtol=1e-4, atol=1e-4)  # RoPE is float32
    assert (dropped[0] - ever[0]).abs().max() > 1e-3
    if sliding is not None:
        torch.testing.assert_close(states[0][0], states[2][0], rtol=1e-9, atol=1e-9)
        assert states[0][0].keys() > states[1][0].keys()


def test_draws_are_a_function_of_seed_and_step():
    drawn = {seed: [window_dropped(0.3, seed=seed, step=step) for step in range(2000)] for seed in (0, 1)}
    assert sum(drawn[0]) / 2000 == pytest.approx(0.3, abs=0.04)
    assert drawn[0] != drawn[1]
    assert drawn[0][777] == window_dropped(0.3, seed=0, step=777)


def test_nothing_is_drawn_without_a_share(monkeypatch):
    monkeypatch.setattr(draws, "_uniform", None)
    assert not any(window_dropped(0.0, seed=0, step=step) for step in range(100))


def test_trained_steps_are_those_drawn(tmp_path):
    """Memories at the end of a run against a loop over its windows."""
    (document,) = make_dataset(tmp_path / "shards", [WINDOW * (STEPS + 1)])
    still = {"model.optimizer.lr": 0, "model.optimizer.gate_lr": 0, "model.memory": "paper-delta", "model.seed": 1}
    options = {"model.window_dropout": 0.5, "model.sliding_window": 16, "trainer.max_steps": STEPS, **still}
    options |= {
        "model.memory_dropout": 0,
        "data.lanes": 1,
        "data.micro_batch_size": 1,
        "trainer.accumulate_grad_batches": 1,
    }
    run = fit(tmp_path / "run", tmp_path / "shards", *(w for k, v in options.items() for w in (f"--{k}", str(v))))
    assert run.code == 0, run.err
    index = DatasetIndex.load(tmp_path / "shards")
    model = load(tmp_path / "run" / "checkpoints", index, "cpu", torch.float32).train()
    draws, carried = [window_dropped(0.5, seed=1, step=step) for step in range(STEPS)], None
    assert 0 < sum(draws[-3:]) < 3
    ids = torch.from_numpy(document[: STEPS * WINDOW].astype("int64"))[None]
    for window, own_segment in zip(ids.split(WINDOW, 1), draws, strict=True):
        with torch.no_grad():
            carried = model.model(window, memory=carried, own_segment=own_segment).memory
    lanes = LaneMemory()
    lanes.load(latest(tmp_path / "run" / "checkpoints"))
    torch.testing.assert_close(lanes.take(torch.arange(1), torch.device("cpu")), carried, rtol=1e-5, atol=1e-6)


def test_there_has_to_be_something_to_drop():
    with pytest.raises(ValueError, match=r"model.window_dropout: found 0.5, expected 0 without model.sliding_window"):
        InfiniModule(window_dropout=0.5)
    assert InfiniModule(window_dropout=0.5, output_memory_dim=4).window_dropout == 0.5
