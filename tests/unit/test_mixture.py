"""Batches of several datasets against the documents that were written, and a mixture through `fit`."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from infini_train.data.lanes import Cursor, LaneScheduler
from infini_train.data.mixture import Mixture, Part
from infini_train.data.queue import QueuedDataset
from infini_train.inspection.events import newest
from tests.helpers.batches import LANES, WINDOW, check_step, datamodule
from tests.helpers.datasets import make_dataset
from tests.helpers.lane_reference import queue_reference
from tests.helpers.results import results
from tests.helpers.runs import fit

LENGTHS = {"text": [40, 12, 31, 5, 90, 17], "tasks": [25, 8, 8, 33]}
WEIGHTS = {"text": 3.0, "tasks": 1.0}
SEED, STEPS = 11, 24


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return root, {name: make_dataset(root / name, lengths) for name, lengths in LENGTHS.items()}


def parts(root, **epochs) -> list[Part]:
    return [Part(str(root / name), WEIGHTS[name], epochs.get(name)) for name in LENGTHS]


def reference():
    """Per step, the lanes' tokens as (document in the mixture, position), laid one by one."""
    given = [(LENGTHS[name], WEIGHTS[name], None) for name in LENGTHS]
    read, lanes = [0, 0], [[] for _ in range(LANES)]
    number_of = [number for number, (lengths, *_) in enumerate(given) for _ in lengths]
    documents = queue_reference(
        given, SEED, lambda: (before, [sum(number_of[lane[0][0]] == n for lane in lanes if lane) for n in (0, 1)])
    )

    def deal():
        number, doc = next(documents)
        return [(number_of.index(number) + doc, i) for i in range(given[number][0][doc])]

    before = list(read)
    for lane in range(LANES):
        lanes[lane] = deal()
    while True:
        step, before = [], list(read)
        for lane in range(LANES):
            row: list[tuple[int, int]] = []
            while len(row) < WINDOW:
                row.append(lanes[lane].pop(0))
                read[number_of[row[-1][0]]] += 1
                lanes[lane] = lanes[lane] or deal()
            step.append(row)
        yield step


@pytest.mark.parametrize(("world_size", "rows", "workers"), [(1, 8, 0), (2, 2, 2)])
def test_batches_and_shares(datasets, world_size, rows, workers):
    root, written = datasets
    documents = [d for name in LENGTHS for d in written[name]]
    for at in (0, 9):  # from the beginning, and resumed
        cursor = None
        if at:
            first = datamodule(parts(root), rows=LANES, steps=at, seed=SEED).train_dataloader()
            cursor = Cursor.from_dict(json.loads(json.dumps(list(first)[-1]["cursor_after"])))
        modules = [
            datamodule(
                parts(root),
                world_size=world_size,
                rank=rank,
                rows=rows,
                workers=workers,
                steps=STEPS,
                cursor=cursor,
                seed=SEED,
            )
            for rank in range(world_size)
        ]
        batches = [list(module.train_dataloader()) for module in modules]
        turns = LANES // (rows * world_size)
        read = {name: 0 for name in LENGTHS}
        for step, expected in enumerate(itertools.islice(reference(), STEPS)):
            for doc, _ in itertools.chain(*expected):
                read["text" if doc < len(LENGTHS["text"]) else "tasks"] += 1
            if step < at:
                continue
            here = slice((step - at) * turns, (step - at + 1) * turns)
            group = [batch for of_rank in batches for batch in of_rank[here]]
            check_step(group, expected, documents)
            label = {f"{root.name}/{name}": n / sum(read.values()) for name, n in read.items()}
            assert all(batch["data_shares"] == pytest.approx(label) for batch in group)


def test_shares_come_to_the_weights_and_lanes_hold_them_from_the_start():
    """Books beside short texts: neither do all lanes take a book at once, nor do short texts crowd them out."""
    lengths = np.array([40_000] * 20 + [300] * 500)
    datasets = [QueuedDataset(20, 0.8), QueuedDataset(500, 0.2)]
    lanes = LaneScheduler(lengths, lanes=20, window=512, seed=1, fingerprint="f", datasets=datasets)
    assert (lanes.doc_L < 20).sum() == 16
    found = []
    for _ in range(3000):
        lanes.next_step()
        read = lanes.tokens_read()
        found.append(read[0] / sum(read))
    assert np.abs(np.array(found[100:]) - 0.8).max() < 0.06
    assert found[-1] == pytest.approx(0.8, abs=0.01)


def test_epochs_end(datasets):
    root, _ = datasets
    once = sum(LENGTHS["tasks"])
    tokens = 2 * sum(LENGTHS["text"]) + once
    enough = tokens // (LANES * WINDOW)
    datamodule(parts(root, text=2, tasks=1), steps=enough)
    datamodule(parts(root, text=2), steps=100)
    with pytest.raises(ValueError, match=rf"data\.train: found {tokens:,} tokens in all epochs, expected"):
        datamodule(parts(root, text=2, tasks=1), steps=enough + 1)
    batches = list(datamodule(parts(root, tasks=1), steps=60).train_dataloader())
    tasks = np.concatenate([b["docs"][b["docs"] >= len(LENGTHS["text"])].numpy() for b in batches])
    assert len(tasks) == once  # every token of it once, and no more


def test_what_is_wrong_is_told_at_once(datasets, tmp_path):
    root, _ = datasets
    make_dataset(tmp_path / "other", [9, 9], vocab_size=77)
    (tmp_path / "other" / "tokenizer.model").write_bytes(b"another")
    given = [Part(str(root / "text"), 0.0), Part(str(tmp_path / "none"), epochs=0), Part(str(tmp_path / "other"))]
    given += [Part(str(root / "tasks"), math.nan), Part(str(root / "tasks"), math.inf)]
    with pytest.raises(ValueError, match="found weight") as error:
        Mixture(given)
    told = str(error.value)
    assert "text: found weight 0.0, expected more than 0" in told
    assert "tasks: found weight nan, expected more than 0" in told
    assert "tasks: found weight inf, expected more than 0" in told
    assert "none: found epochs 0, expected at least 1" in told
    assert len(told.splitlines()) >= 3
    a, b = Mixture(parts(root)), Mixture([Part(p.path, 2 * p.weight, p.epochs) for p in parts(root)])
    assert a.fingerprint != b.fingerprint


def test_fit_resumes_to_the_bit_and_logs_shares(datasets, tmp_path):
    root, _ = datasets
    told = json.dumps([{"path": str(root / name), "weight": WEIGHTS[name]} for name in LENGTHS])

    def run(name: str, steps: int) -> None:
        options = ("--data.train", told, "--trainer.max_steps", str(steps), "--model.optimizer.schedule", "wsd")
        result = fit(tmp_path / name, root / "text", *options, "--model.optimizer.decay_steps", "1")
        assert result.code == 0, result.err

    run("whole", 9)
    run("halves", 5)
    run("halves", 9)
    whole, halves = results(tmp_path / "whole"), results(tmp_path / "halves")
    assert whole["cursor"] == halves["cursor"]
    for kind in ("tensors", "lanes"):
        assert whole[kind].keys() == halves[kind].keys()
    assert all(torch.equal(x, halves["tensors"][name]) for name, x in whole["tensors"].items())
    shares = {f"data/share {root.name}/{name}": 9 for name in LENGTHS}
    points = newest(tmp_path / "whole" / "tensorboard", shares).points
    assert sum(of[0].value for of in points.values()) == pytest.approx(1)
    assert points[f"data/share {root.name}/text"][0].value > 0.5
