"""What lanes carry in training with memory_dropout, against a loop over windows that begins anew where lanes drop."""

import numpy as np
import pytest
import torch

from infini_train.data.index import DatasetIndex
from infini_train.data.lanes import LaneScheduler
from infini_train.evaluation.subject import load
from infini_train.run_files import latest
from infini_train.training.draws import dropped
from infini_train.training.lane_memory import LaneMemory
from infini_train.training.module import InfiniModule
from tests.helpers.datasets import make_dataset
from tests.helpers.runs import fit

LANES, WINDOW, STEPS = 4, 32, 6


@pytest.mark.parametrize("memory", ["paper-delta", "selective-delta"])
def test_dropped_lanes_begin_anew(tmp_path, memory):
    documents = make_dataset(tmp_path / "shards", [WINDOW * (STEPS + 1)] * LANES)
    still = {"model.optimizer.lr": 0, "model.optimizer.gate_lr": 0, "model.memory": memory, "model.seed": 7}
    options = {"model.memory_dropout": 0.4, "trainer.max_steps": STEPS, **still}
    run = fit(tmp_path / "run", tmp_path / "shards", *(w for k, v in options.items() for w in (f"--{k}", str(v))))
    assert run.code == 0, run.err
    index = DatasetIndex.load(tmp_path / "shards")
    model = load(tmp_path / "run" / "checkpoints", index, "cpu", torch.float32).train()
    order = LaneScheduler(index.tokens_D, lanes=LANES, window=WINDOW, seed=0, fingerprint="").doc_L
    carried, drops = None, []
    for step in range(STEPS):
        ids = np.stack([documents[d][step * WINDOW : (step + 1) * WINDOW] for d in order]).astype(np.int64)
        if step:
            drops.append(dropped(0.4, seed=7, step=step, lane_ids=torch.arange(LANES)))
            empty = model.init_memory(LANES)
            keep = [(~drops[-1]).view(-1, *[1] * (x.dim() - 1)) for x in carried[0].values()]
            carried = [
                {name: torch.where(k, layer[name], none[name]) for k, name in zip(keep, layer, strict=True)}
                for layer, none in zip(carried, empty, strict=True)
            ]
        with torch.no_grad():
            carried = model.model(torch.from_numpy(ids), memory=carried).memory
    lately = torch.stack(drops[-2:])
    assert lately.any() and not lately.all()  # old drops fade
    lanes = LaneMemory()
    lanes.load(latest(tmp_path / "run" / "checkpoints"))
    found = lanes.take(torch.arange(LANES), torch.device("cpu"))
    for mine, expected in zip(found, carried, strict=True):
        for name, x in expected.items():
            torch.testing.assert_close(mine[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [-0.1, 1.0])
@pytest.mark.parametrize("name", ["memory_dropout", "window_dropout"])
def test_bad_share(name, share):
    with pytest.raises(ValueError, match=f"model.{name}: found {share}, expected at least 0 and below 1"):
        InfiniModule(**{name: share})
