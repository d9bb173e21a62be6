"""A run continues with a dataset to which documents were appended."""

import json
import os
import shutil
import subprocess
import sys
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.shard import append_corpus, shard_corpus
from data_prep.train_tokenizer import train_tokenizer
from infini_train.data.index import DatasetIndex
from infini_train.data.lanes import Cursor, LaneScheduler
from tests.helpers.corpora import CONFIG, text
from tests.helpers.lane_reference import tokens_of

lengths = st.lists(st.integers(2, 20), min_size=1, max_size=8)


def documents_in_order(before: int, after: int, grown_in: int, seed: int):
    """Reference for a run whose dataset has grown during epoch `grown_in`."""
    for epoch in count():
        documents = before if epoch <= grown_in else after
        keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(documents).tolist()
        yield from sorted(range(documents), key=keys.__getitem__)


@settings(max_examples=60, deadline=None)
@given(lengths, lengths, st.integers(1, 3), st.integers(1, 12), st.integers(0, 6), st.integers(0, 12))
def test_epoch_ends_as_it_began(old, new, lanes, window, first, later):
    """Lanes take documents in the order of a plain reference, also when the scheduler is resumed at any step."""
    whole, seed = np.array(old + new), 7

    def scheduler(tokens_D, cursor):
        return LaneScheduler(tokens_D, lanes=lanes, window=window, seed=seed, fingerprint="f", cursor=cursor)

    before = scheduler(np.array(old), None)
    found = [tokens_of(before.next_step(), lanes) for _ in range(first)]
    cursor = Cursor.from_dict(json.loads(json.dumps(before.cursor.to_dict() | {"epoch_documents": len(old)})))
    grown_in = cursor.queue_positions()[0].epoch
    after = scheduler(whole, cursor)
    for step in range(24):
        if step == later:
            after = scheduler(whole, Cursor.from_dict(json.loads(json.dumps(after.cursor.to_dict()))))
        found.append(tokens_of(after.next_step(), lanes))
    assert after.cursor.epoch_documents == (len(old) if after.cursor.queue_positions()[0].epoch == grown_in else 0)

    order = documents_in_order(len(old), len(whole), grown_in, seed)
    streams: list[list[tuple[int, int]]] = [[] for _ in range(lanes)]

    def deal():
        doc = next(order)
        return [(doc, i) for i in range(whole[doc])]

    streams = [deal() for _ in range(lanes)]
    for step in found:
        for lane in range(lanes):
            row = []
            while len(row) < window:
                row.append(streams[lane].pop(0))
                if not streams[lane]:
                    streams[lane] = deal()
            assert step[lane] == row


def fit(run: Path, train: Path, steps: int, *options: str) -> subprocess.CompletedProcess:
    config = {**CONFIG, "data": {**CONFIG["data"], "train": str(train)}}
    config["trainer"] = {**CONFIG["trainer"], "max_steps": steps}
    config["model"] = {**CONFIG["model"], "optimizer": {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 0}}
    run.parent.mkdir(exist_ok=True)
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    words = [sys.executable, "-m", "infini_train", "fit", "--config", path, "--run", run, "--ckpt_path", "last"]
    return subprocess.run([*words, *options], capture_output=True, text=True, timeout=120, env=dict(os.environ))


def losses(run: Path) -> dict[int, float]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


@pytest.mark.slow
def test_a_grown_dataset_is_refused_unless_allowed(tmp_path):
    for name, numbers in (("first", range(6)), ("more", range(6, 12))):
        (tmp_path / name).mkdir()
        for i in numbers:
            (tmp_path / name / f"{i}.txt").write_text(text(i, 200))
    train_tokenizer([tmp_path / "first"], tmp_path / "t.model", vocab_size=290)
    data = tmp_path / "data"
    shard_corpus([tmp_path / "first"], data, tmp_path / "t.model")
    before = DatasetIndex.load(data)
    assert fit(tmp_path / "run", data, 3).returncode == 0
    append_corpus([tmp_path / "more"], data)
    after = DatasetIndex.load(data)
    assert after.earlier == {before.fingerprint: 6} and after.documents == 12

    refused = fit(tmp_path / "run", data, 12)
    assert refused.returncode != 0
    message = f"{data} has grown from 6 to 12 documents since then; --data.allow_growth true goes on with it"
    assert message in " ".join(refused.stderr.split())
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    grow = ("--data.allow_growth", "true")
    assert (done := fit(tmp_path / "run", data, 12, *grow)).returncode == 0, done.stderr[-2000:]
    assert "from 6 to 12 documents" in done.stdout + done.stderr
    for steps in (5, 12):  # within the epoch of growth; the second resume needs no flag
        assert (done := fit(tmp_path / "other", data, steps, *(grow if steps == 5 else ()))).returncode == 0, (
            done.stderr
        )
    assert losses(tmp_path / "other") == losses(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 12


def test_earlier_fingerprints_of_several_appends(tmp_path):
    (tmp_path / "in").mkdir()
    fingerprints = []
    for i in range(4):
        (tmp_path / "in" / f"{i}.txt").write_text(text(i, 60))
    train_tokenizer([tmp_path / "in"], tmp_path / "t.model", vocab_size=290)
    for i in range(4):
        source = tmp_path / "in" / f"{i}.txt"
        if i:
            append_corpus([source], tmp_path / "out")
        else:
            shard_corpus([source], tmp_path / "out", tmp_path / "t.model")
        fingerprints.append(DatasetIndex.load(tmp_path / "out").fingerprint)
    expected = dict(zip(fingerprints, islice(count(1), 3), strict=False))
    assert DatasetIndex.load(tmp_path / "out").earlier == expected
