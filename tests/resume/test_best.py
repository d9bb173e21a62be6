"""The best checkpoint by a metric stays until a better one is complete, whatever happens in between."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from infini_train.run_files import best, find
from infini_train.training.best import BestCheckpoint
from infini_train.training.checkpoint_directory import CheckpointDirectory
from tests.helpers.datasets import make_dataset
from tests.helpers.results import LENGTHS, assert_identical, results
from tests.helpers.runs import Result, fit

# Validations after every step and a half.
OPTIONS = ["--model.optimizer.lr", "0.02", "--trainer.max_steps", "12", "--trainer.val_check_interval", "3"]
OPTIONS += ["--checkpoint.every_n_steps", "5", "--checkpoint.keep_last", "1", "--model.optimizer.warmup_steps", "1"]
BEST = ["--checkpoint.best", "val/loss"]


def train(run: Path, root: Path, *extra: str, **instant: Any) -> Result:
    return fit(run, root / "shards", "--data.validation", str(root / "valid"), *OPTIONS, *extra, **instant)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def best_step(found: dict) -> int:
    """The step of the lowest validation loss, from the curve that tensorboard has."""
    return min(found["curves"]["val/loss"], key=lambda point: (point[1], point[0]))[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in which the validation loss falls until the model gives about half of its trust to the 7 kinds of tokens
    that it is trained on, and then rises, because it is validated on 13 kinds."""
    root = tmp_path_factory.mktemp("best")
    make_dataset(root / "shards", LENGTHS, vocab_size=10)
    make_dataset(root / "valid", [90, 40, 33], vocab_size=16, seed=1)
    done = train(root / "run", root, *BEST)
    assert done.code == 0, done.err
    return root, results(root / "run"), done.instants


def test_the_best_stays_beside_the_last(whole, tmp_path):
    root, found, _ = whole
    step = best_step(found)
    assert 1 < step < 12 and step % 5  # not the first one, and a save that only the metric asked for
    assert steps(root / "run") == [step, 12]
    path = best(root / "run" / "checkpoints")
    assert path == root / "run" / "checkpoints" / f"step-{step:08d}"
    assert find(root / "run" / "checkpoints" / "best") == path
    assert json.loads((path / "metrics.json").read_text())["validation"]["step"] == step
    plain = train(tmp_path / "plain", root)
    assert plain.code == 0, plain.err
    other = results(tmp_path / "plain")
    for state in (found["state"], other["state"]):
        state.pop("loops", None)
    assert_identical(other, found)  # training does not notice


def test_it_can_be_gone_back_to(whole, tmp_path):
    root, found, _ = whole
    step = best_step(found)
    done = train(tmp_path / "next", root, "--ckpt_path", str(root / "run" / "checkpoints" / "best"))
    assert done.code == 0, done.err
    assert (tmp_path / "next" / "checkpoints" / "latest").read_text() == "step-00000012"
    other = results(tmp_path / "next")
    assert other["curves"]["train/loss"] == [(s, x) for s, x in found["curves"]["train/loss"] if s > step]
    for part in ("tensors", "lanes", "cursor"):
        assert_identical(other[part], found[part], part)
    missing = train(tmp_path / "next", root, "--ckpt_path", "best")
    assert missing.code == 2
    assert "found no best checkpoint; --checkpoint.best names the metric" in missing.err


@pytest.mark.parametrize("part", [0.6, *(pytest.param(part, marks=pytest.mark.slow) for part in (0.15, 0.35, 0.8))])
def test_killed_and_resumed(whole, tmp_path, part):
    """At no instant is the best validated checkpoint missing; in the end it is that of the unbroken run."""
    root, expected, instants = whole
    run = tmp_path / "run"
    killed = train(run, root, *BEST, die_at=int(part * instants))
    assert killed.code == -signal.SIGKILL
    path = best(run / "checkpoints")
    if path is not None:
        assert (path / "COMPLETE").is_file()
    resumed = train(run, root, *BEST)
    assert resumed.code == 0, resumed.err
    found = results(run)
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)
    assert_identical(found, expected)
    assert steps(run) == steps(root / "run")
    assert best(run / "checkpoints").name == best(root / "run" / "checkpoints").name


@pytest.mark.slow
def test_without_the_option_the_mark_goes(whole, tmp_path):
    root, run = whole[0], tmp_path / "run"
    assert train(run, root, *BEST, "--trainer.max_steps", "6").code == 0
    assert (run / "checkpoints" / "best").is_file()
    assert train(run, root).code == 0
    assert not (run / "checkpoints" / "best").exists()
    assert steps(run) == [12]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["val/los"], "checkpoint.best: found val/los, expected val/loss, or memory_benefit, recall or segment_N"),
        (["val/books/loss"], "checkpoint.best: found val/books/loss, expected val/loss"),
        (["val/loss", "--trainer.limit_val_batches", "0"], "expected none: the run has no validation"),
    ],
)
def test_metrics_that_are_not_logged_are_refused_at_the_start(whole, tmp_path, words, message):
    refused = train(tmp_path / "run", whole[0], "--checkpoint.best", *words)
    assert refused.code == 2
    assert message in refused.err


def test_a_metric_that_this_data_lacks_ends_the_run_after_a_save(whole, tmp_path):
    ended = train(tmp_path / "run", whole[0], "--checkpoint.best", "val/recall")
    assert ended.code == 2
    assert (
        "checkpoint.best: found val/recall, expected one of val/loss, val/memory_benefit, val/segment_0" in ended.err
    )
    assert steps(tmp_path / "run") == [1]


@pytest.mark.parametrize(("mode", "wanted"), [("min", 30), ("max", 50)])
def test_choice(tmp_path, mode, wanted):
    """By value; validations of other steps, values that are no numbers and equal values are no reason."""
    directory = CheckpointDirectory(tmp_path, keep_last=1, best=BestCheckpoint("val/loss", mode))
    values = {10: 3.0, 20: float("nan"), 30: 2.0, 40: 2.0, 50: 4.0, 60: 4.0, 70: 2.5}
    for step, value in values.items():
        path = directory.of_step(step)
        path.mkdir()
        (path / "COMPLETE").write_text("{}")
        metrics = {"step": step, "validation": {"step": step, "val/loss": value}}
        if step == 70:
            metrics["validation"] = {"step": 60, "val/loss": -1.0 if mode == "min" else 9.0}
        directory.retain(path, metrics)
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step-*")) == [wanted, 70]
    assert best(tmp_path).name == f"step-{wanted:08d}"
    assert BestCheckpoint("val/loss", mode).improves({"step": 1, "validation": {"step": 1, "val/loss": 5.0}})
