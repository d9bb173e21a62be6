"""What a run begins from: another run's checkpoint, its weights only, its own older or only checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from infini_train.run_files import complete, read_record, write_record
from tests.helpers.datasets import make_dataset
from tests.helpers.results import assert_identical, results, tensors
from tests.helpers.runs import fit

CONSTANT = ("--model.optimizer.schedule", "wsd", "--model.optimizer.decay_steps", "0")
SMALL = (*CONSTANT, "--trainer.val_check_interval", "100", "--trainer.accumulate_grad_batches", "1")
SMALL += ("--data.micro_batch_size", "4", "--checkpoint.every_n_steps", "2")


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete(run / "checkpoints")]


def same(found: Path, expected: Path) -> None:
    a, b = results(found), results(expected)
    for result in (a, b):
        result["state"].pop("loops")  # Lightning counts its own restarts
        del result["curves"]  # one of them began later
    assert_identical(a, b)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 4 steps, and the same run of 6."""
    root = tmp_path_factory.mktemp("branches")
    make_dataset(root / "shards", [300, 45, 120, 200])
    assert fit(root / "run", root / "shards", *SMALL, "--trainer.max_steps", "4").code == 0
    shutil.copytree(root / "run", root / "six")
    assert fit(root / "six", root / "shards", *SMALL, "--trainer.max_steps", "6").code == 0
    return root


def copy(trained: Path, to: Path) -> Path:
    return shutil.copytree(trained / "run", to)


SLOW = pytest.mark.slow
OTHER_CONTENTS = ["", "step-00000099", "nonsense", "\0\0\0"]


@pytest.mark.parametrize("content", [None, *(pytest.param(text, marks=SLOW) for text in OTHER_CONTENTS)])
def test_a_lost_latest(trained, tmp_path, content):
    """The run goes on from its newest complete checkpoint, and removes none that it has not written."""
    run = copy(trained, tmp_path / "run")
    shutil.copytree(run / "checkpoints/step-00000002", run / "checkpoints/step-00000001")  # of another run
    (run / "checkpoints/latest").unlink()
    if content is not None:
        (run / "checkpoints/latest").write_text(content)
    went_on = fit(run, trained / "shards", *SMALL, "--trainer.max_steps", "6", "--checkpoint.keep_last", "1")
    assert went_on.code == 0, went_on.err
    assert "latest names step-00000004 from now on" in went_on.err
    assert steps(run) == [1, 6]
    same(run, trained / "six")


def test_checkpoints_that_are_lost_are_not_started_over(trained, tmp_path):
    """As where a disk is not mounted."""
    run = copy(trained, tmp_path / "run")
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    refused = fit(run, trained / "shards", *SMALL)
    assert refused.code == 2
    assert f"{run}/checkpoints: found no checkpoint, expected step-00000002, step-00000004, which" in refused.err
    (run / "run.json").unlink()
    assert fit(run, trained / "shards", *SMALL, "--trainer.max_steps", "2").code == 0  # as the message says
    assert steps(run) == [2]


def test_checkpoints_that_none_of_is_complete_are_not_started_over(trained, tmp_path):
    run = copy(trained, tmp_path / "run")
    (run / "checkpoints/latest").unlink()
    for path in complete(run / "checkpoints"):
        (path / "COMPLETE").unlink()
    refused = fit(run, trained / "shards", *SMALL)
    assert refused.code == 2
    assert "found step-00000002, step-00000004, but no complete checkpoint among them" in refused.err
    assert len(list((run / "checkpoints").glob("step-*/state.ckpt"))) == 2


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_put_aside_not_replaced(trained, tmp_path):
    run = copy(trained, tmp_path / "run")
    foreign = run / "checkpoints/step-00000006"
    shutil.copytree(trained / "six/checkpoints/step-00000006", foreign)
    assert fit(run, trained / "shards", *SMALL, "--trainer.max_steps", "6").code == 0
    kept = run / "checkpoints/step-00000006.replaced-1"
    assert tensors(kept).keys() == tensors(foreign).keys()
    assert steps(run) == [4, 6]
    same(run, trained / "six")


@pytest.mark.parametrize(
    "given", ["run", *(pytest.param(f"run/checkpoints{step}", marks=SLOW) for step in ("", "/step-00000004"))]
)
def test_a_run_that_was_killed_before_its_first_save_remembers_what_it_began_from(trained, tmp_path, given):
    branch = tmp_path / "branch"
    options = (*SMALL, "--trainer.max_steps", "6")
    killed = fit(
        branch, trained / "shards", *options, "--ckpt_path", str(trained / given), die_at=1, within="training_step"
    )
    assert killed.code == -9
    assert not steps(branch)
    assert read_record(branch)["begun_from"] == str(trained / "run/checkpoints/step-00000004")
    resumed = fit(branch, trained / "shards", *options)
    assert resumed.code == 0, resumed.err
    same(branch, trained / "six")


def test_a_checkpoint_of_another_run_does_not_replace_those_of_this_run(trained, tmp_path):
    run = copy(trained, tmp_path / "run")
    refused = fit(run, trained / "shards", *SMALL, "--ckpt_path", str(trained / "six"))
    assert refused.code == 2
    assert "has checkpoints; --ckpt_path last resumes them, --run names another run" in refused.err


@pytest.mark.slow
def test_a_run_that_went_back_stays_there_after_a_kill(trained, tmp_path):
    run = copy(trained, tmp_path / "run")
    back = ("--ckpt_path", str(run / "checkpoints/step-00000002"))
    assert fit(run, trained / "shards", *SMALL, *back, die_at=1, within="training_step").code == -9
    assert (run / "checkpoints/latest").read_text() == "step-00000002"
    again = fit(run, trained / "shards", *SMALL, "--trainer.max_steps", "6")
    assert again.code == 0, again.err
    same(run, trained / "six")


def test_weights_alone_on_other_data_with_other_lanes_and_segments(trained, tmp_path):
    """A rate of 0 shows which weights the run begins with."""
    make_dataset(tmp_path / "other", [150, 80, 90, 400], seed=3)
    options = (*SMALL, "--model.optimizer.lr", "0", "--model.optimizer.gate_lr", "0", "--trainer.max_steps", "2")
    options += ("--data.lanes", "2", "--data.micro_batch_size", "2", "--data.segment_length", "4")
    given = ("--ckpt_path", str(trained / "run"), "--restore", "weights")
    assert fit(tmp_path / "run", tmp_path / "other", *options, *given, die_at=1, within="training_step").code == -9
    found = fit(tmp_path / "run", tmp_path / "other", *options)  # `last` remembers that it was the weights
    assert found.code == 0, found.err
    last = tmp_path / "run/checkpoints/step-00000002"
    assert json.loads((last / "cursor.json").read_text())["step"] == 2
    before, after = tensors(trained / "run/checkpoints/step-00000004"), tensors(last)
    assert after["step/model.model.norm.weight"] == 2  # a new optimizer
    for name in before:
        if name.startswith("weight/"):
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("strategy", ["auto", *(pytest.param(f"zero{n}", marks=SLOW) for n in (1, 2, 3))])
def test_weights_and_optimizer_on_other_data(trained, tmp_path, strategy):
    """At a rate of 0 the gradients are those of a run with a new optimizer, and the moments go on from the old."""
    make_dataset(tmp_path / "other", [150, 80, 90, 400], seed=3)
    options = (*SMALL, "--model.optimizer.lr", "0", "--model.optimizer.gate_lr", "0", "--trainer.max_steps", "2")
    options += ("--data.lanes", "2", "--data.micro_batch_size", "2", "--trainer.strategy", strategy)
    given = ("--ckpt_path", str(trained / "run"), "--restore")
    found, fresh = tmp_path / "found", tmp_path / "fresh"
    assert fit(fresh, tmp_path / "other", *options, *given, "weights").code == 0
    killed = fit(found, tmp_path / "other", *options, *given, "optimizer", die_at=1, within="training_step")
    assert killed.code == -9
    ended = fit(found, tmp_path / "other", *options)  # `last` remembers what it was
    assert ended.code == 0, ended.err
    old, new, moved = (
        tensors(run / "checkpoints" / step)
        for run, step in ((trained / "run", "step-00000004"), (fresh, "step-00000002"), (found, "step-00000002"))
    )
    for name, value in moved.items():
        kind = name.split("/")[0]
        beta = {"exp_avg": 0.9, "exp_avg_sq": 0.95, "step": 1, "weight": 0}[kind]
        torch.testing.assert_close(value, new[name] + beta**2 * old[name], rtol=1e-5, atol=1e-9, msg=name)
        assert kind != "weight" or torch.equal(value, old[name]), name
    refused = fit(
        tmp_path / "sgd", tmp_path / "other", *options, *given, "optimizer", "--model.optimizer.name", "sgd"
    )
    assert refused.code == 2 and "model.optimizer.name: found sgd, expected adamw" in refused.err


@pytest.mark.parametrize("begun", [{}, {"begun_from": "/elsewhere/step-00000004", "restore": "all"}])
def test_weights_of_nothing_are_refused(trained, tmp_path, begun):
    """`last` of a run without checkpoints may name nothing, or what the run has begun from in another way."""
    (tmp_path / "run").mkdir()
    if begun:
        write_record(tmp_path / "run", {**begun, "saved": {}})
    refused = fit(tmp_path / "run", trained / "shards", *SMALL, "--restore", "weights")
    assert refused.code == 2
    assert "restore: found weights, expected --ckpt_path with the checkpoint that has the weights" in refused.err


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"begun_from": null, "restore": "all"}'])
def test_a_damaged_record_says_that_the_run_can_do_without(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.json: damaged: found .*; remove it: the run goes on"):
        read_record(tmp_path)


def test_other_data_is_refused_in_a_sentence(trained, tmp_path):
    make_dataset(tmp_path / "other", [150, 80, 90, 400], seed=3)
    given = ("--ckpt_path", str(trained / "run"), "--data.seed", "7", "--data.segments_per_window", "2")
    refused = fit(tmp_path / "run", tmp_path / "other", *SMALL, *given)
    assert refused.code == 2
    for part in ("another dataset", "data.seed 0, not 7", "windows of 32 tokens", "--restore weights"):
        assert part in refused.err


def test_nothing_to_do(trained, tmp_path):
    run = copy(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    again = fit(run, trained / "shards", *SMALL, "--trainer.max_steps", "4")
    assert again.code == 0
    assert "no step is left: " in again.err and "step-00000004 has done 4 of 4 steps (trainer.max_steps)" in again.err
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before
