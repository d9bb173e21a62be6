"""Steps whose loss leaps are left out: which ones by a plain loop over the logged losses, and what that changes."""

import io
import json
import signal
import statistics
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.data.index import DatasetIndex
from infini_train.data.reader import TokenReader
from tests.helpers.datasets import make_dataset
from tests.helpers.job import CONSTANT
from tests.helpers.job import run as job
from tests.helpers.results import assert_identical, results
from tests.helpers.runs import fit

THRESHOLD, WINDOW, STEPS = 6.0, 8, 40
OPTIONS = ["--spike_threshold", str(THRESHOLD), "--spike_window", str(WINDOW), "--trainer.max_steps", str(STEPS)]
OPTIONS += ["--model.optimizer.lr", "0.01", "--model.optimizer.ema_decay", "0.9", "--trainer.limit_val_batches", "0"]
OPTIONS += [*CONSTANT, "--checkpoint.every_n_steps", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Documents of 7 kinds of tokens, and now and then one of tokens that the model does not expect."""
    root = tmp_path_factory.mktemp("spikes")
    make_dataset(root / "usual", [200, 300, 150, 260], vocab_size=10)
    make_dataset(root / "odd", [60, 70], vocab_size=100, seed=1)
    return [str(root / name) for name in ("usual", "odd")]


def mixed(data: list[str]) -> str:
    return json.dumps([{"path": data[0], "weight": 1.0}, {"path": data[1], "weight": 0.02}])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    done = fit(run, Path(data[0]), *OPTIONS, "--data.train", mixed(data))
    assert done.code == 0, done.err
    return run, done


def left_out(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "skipped-steps.jsonl").read_text().splitlines()]


def expected_spikes(run: Path) -> list[int]:
    """Steps (from 0) that a plain loop over the logged losses finds."""
    taken: list[float] = []
    spikes = []
    for step, loss in results(run)["curves"]["train/loss"]:
        last = taken[-WINDOW:]
        if len(last) >= WINDOW // 2 and loss > statistics.fmean(last) + THRESHOLD * statistics.stdev(last):
            spikes.append(step - 1)
        else:
            taken.append(loss)
    return spikes


def test_spikes_are_left_out_and_their_documents_named(whole, data):
    run, done = whole
    spikes = expected_spikes(run)
    assert 0 < len(spikes) < 8
    found = left_out(run)
    assert [line["step"] for line in found] == spikes
    for line in found:
        assert f"left out step {line['step']}: its loss {line['loss']:.4f} is more than 6 standard dev" in done.err
        assert data[1] in {document["dataset"] for document in line["documents"]}
        for document in line["documents"]:
            assert document["id"] == str(document["document"])  # as make_dataset names them
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert board.Scalars("train/skipped_steps")[-1].value == len(spikes)
    last = results(run)["tensors"]
    steps = [value for key, value in last.items() if key.startswith("step/")]
    assert steps and all(step == STEPS - len(spikes) for step in steps)


@pytest.mark.parametrize("part", [0.8, *(pytest.param(part, marks=pytest.mark.slow) for part in (0.3, 0.5, 0.95))])
def test_killed_and_resumed(whole, data, tmp_path, part):
    """The mean and deviation of the steps before a kill still count; no step is named twice."""
    run, done = whole
    options = [*OPTIONS, "--data.train", mixed(data)]
    killed = fit(tmp_path / "run", Path(data[0]), *options, die_at=int(part * done.instants))
    assert killed.code == -signal.SIGKILL
    resumed = fit(tmp_path / "run", Path(data[0]), *options)
    assert resumed.code == 0, resumed.err
    expected, found = results(run), results(tmp_path / "run")
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)
    assert_identical(found, expected)
    assert left_out(tmp_path / "run") == left_out(run)


def test_too_many_in_a_row_end_the_run(data, tmp_path):
    words = ["--nonfinite", "skip", "--max_skips", "3", "--trainer.max_steps", "9", "--model.optimizer.lr", "1e30"]
    ended = fit(tmp_path / "run", Path(data[0]), *words)
    assert ended.code == 2
    assert (
        "step 3: found 3 steps in a row that had to be left out (max_skips), this one because its loss" in ended.err
    )
    assert [line["step"] for line in left_out(tmp_path / "run")] == [1, 2, 3]
    refused = fit(
        tmp_path / "run", Path(data[0]), "--spike_threshold", "-1", "--spike_window", "1", "--max_skips", "0"
    )
    assert refused.code == 2
    for line in (
        "spike_threshold: found -1.0, expected more than 0, or none",
        "spike_window: found 1, expected at least 4",
        "max_skips: found 0, expected at least 1",
    ):
        assert line in refused.err


def test_ids_of_documents(data, tmp_path):
    """Before or behind the tokens, as webdataset's writer and others put them."""
    index = DatasetIndex.load(Path(data[1]))
    assert [TokenReader(index).id_of(doc) for doc in range(2)] == ["0", "1"]
    path = Path(data[1]) / "shard-00000.tar"
    with tarfile.open(path) as tar:
        order = [member.name.partition(".")[2] for member in tar]
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    assert len(order) == 4
    turned = tmp_path / "turned"
    turned.mkdir()
    with tarfile.open(turned / path.name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for first, second in zip(members[::2], members[1::2], strict=True):
            for member, content in (second, first):
                tar.addfile(member, io.BytesIO(content))
    with tarfile.open(turned / path.name) as tar:
        offsets = [member.offset_data for member in tar if member.name.endswith("tokens.bin")]
    index.offset_D[:] = offsets
    size = (turned / path.name).stat().st_size
    other = replace(index, root=turned, shards=[replace(index.shards[0], bytes=size)])
    assert [TokenReader(other).id_of(doc) for doc in range(2)] == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_two_ranks_leave_out_what_one_does(whole, data, tmp_path, strategy):
    run, _ = whole
    done = job(tmp_path / "run", Path(data[0]), 2, strategy, *OPTIONS, "--data.train", mixed(data), accumulate=2)
    assert done.code == 0, done.err
    found, expected = left_out(tmp_path / "run"), left_out(run)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, two in zip(expected, found, strict=True):
        assert one["documents"] == two["documents"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    one, two = results(run)["tensors"], results(tmp_path / "run")["tensors"]
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-2, atol=2e-3, msg=key)
