"""A signal at any instant: the run saves, leaves, and goes on as if nothing had been; every step is done once."""

import json
import random
import shutil
import signal
import subprocess
import sys

import pytest

from infini_train.run_files import read_record
from infini_train.training.checkpoint_directory import CheckpointDirectory, identity
from infini_train.training.checkpoint_format import check, verify
from tests.helpers.datasets import make_dataset
from tests.helpers.results import LENGTHS, assert_identical, logged_losses, results
from tests.helpers.runs import fit


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("seed", range(5))
def test_a_signal_at_any_instant(unbroken, tmp_path, number, seed):
    dataset, expected, instants = unbroken
    run = tmp_path / "run"
    for instant in sorted(random.Random(f"{number}{seed}").sample(range(1, instants - 20), 2)):
        left = fit(run, dataset, die_at=instant, number=number)
        assert left.code in (128 + number, 0), left.err  # 0: it was in the last step or after
    if left.code:
        assert f"infini-train: {number.name}: leaving, saved up to" in left.err
        assert fit(run, dataset).code == 0
    found = results(run)
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)  # as in test_resume
    assert_identical(found, expected)
    assert [step for losses in logged_losses(run) for step, _ in losses] == list(range(1, 21))


def test_a_signal_in_a_validation_inside_an_accumulated_step(tmp_path):
    """The checkpoint is of the end of the step before, though memories have gone on since; nothing is done twice."""
    make_dataset(tmp_path / "shards", LENGTHS)
    options = ("--trainer.val_check_interval", "5", "--trainer.max_steps", "8", "--checkpoint.every_n_steps", "50")
    whole = fit(tmp_path / "whole", tmp_path / "shards", *options, within="validation_step")
    assert whole.code == 0, whole.err
    of_one = whole.instants // 3  # validations after 5, 10 and 15 micro-batches, of which a step has 2
    run = tmp_path / "run"
    for instant, step in ((of_one // 2, 2), (2 * of_one + of_one // 2, 7)):
        left = fit(
            run, tmp_path / "shards", *options, die_at=instant, number=signal.SIGTERM, within="validation_step"
        )
        assert left.code == 128 + signal.SIGTERM, left.err
        assert f"saved up to {run}/checkpoints/step-{step:08d}" in left.err
    resumed = fit(run, tmp_path / "shards", *options)
    assert resumed.code == 0, resumed.err
    expected, found = results(tmp_path / "whole"), results(run)
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)  # as in test_resume
    assert_identical(found, expected)


def test_ctrl_c_saves_and_leaves(unbroken, tmp_path):
    dataset, expected, _ = unbroken
    left = fit(tmp_path / "run", dataset, die_at=9, number=signal.SIGINT, within="training_step")
    assert left.code == 130, left.err
    assert "saving and leaving at the end of this step; Ctrl-C again leaves at once" in left.err
    assert f"SIGINT: leaving, saved up to {tmp_path}/run/checkpoints/step-00000003" in left.err
    assert fit(tmp_path / "run", dataset).code == 0
    found = results(tmp_path / "run")
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)  # as in test_resume
    assert_identical(found, expected)


INTERRUPTED_TWICE = """
import os, signal
from infini_train import preemption
preemption.listen()
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGTERM)  # as a launcher sends it when it is interrupted itself
print("goes on", flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("still there", flush=True)
"""


def test_a_second_ctrl_c_leaves_at_once():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_TWICE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "goes on\n")
    assert done.stderr.endswith("SIGINT again: leaving at once, without saving\n")


def test_ctrl_c_ends_a_validation(unbroken, tmp_path):
    dataset = unbroken[0]
    run = shutil.copytree(dataset.parent / "unbroken", tmp_path / "run")
    options = {"die_at": 3, "number": signal.SIGINT, "within": "validation_step", "command": "validate"}
    ended = fit(run, dataset, **options)
    assert ended.code == 130, ended.err
    assert ended.err.strip().splitlines()[-1] == "infini-train validate: interrupted"


def test_validation_of_a_run_that_cannot_be_written(unbroken, tmp_path):
    dataset = unbroken[0]
    (tmp_path / "mounted").mkdir()
    run = shutil.copytree(dataset.parent / "unbroken", tmp_path / "run")
    (run / "first-validation-error.txt").write_text("of an earlier start")
    mount = ["mount", "--bind", "-o", "ro", run, tmp_path / "mounted"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a directory")
    try:
        done = fit(tmp_path / "mounted", dataset, command="validate")
    finally:
        subprocess.run(["umount", tmp_path / "mounted"], check=True)
    assert done.code == 0, done.err


def test_a_checkpoint_holds_the_validation_that_follows_its_step(tmp_path):
    """Also if a signal comes during the validation: then it is added when the validation has been done."""
    make_dataset(tmp_path / "shards", LENGTHS)
    options = ("--trainer.max_steps", "12")  # a validation follows steps 6 and 12
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert fit(whole, tmp_path / "shards", *options).code == 0
    expected = results(whole)
    losses = dict(expected["curves"]["val/loss"])
    assert expected["metrics"]["validation"]["step"] == 12
    assert expected["metrics"]["validation"]["val/loss"] == pytest.approx(losses[12])

    def validation(step: int) -> dict | None:
        path = run / "checkpoints" / f"step-{step:08d}"
        check(path)
        verify(path)
        assert read_record(run)["saved"][path.name] == identity(path)
        return json.loads((path / "metrics.json").read_text())["validation"]

    during = {"die_at": 1, "within": "validation_step", "number": signal.SIGTERM}
    assert fit(run, tmp_path / "shards", *options, **during).code == 128 + signal.SIGTERM
    assert validation(6) is None
    assert fit(run, tmp_path / "shards", *options, die_at=1, within="training_step").code == -signal.SIGKILL
    assert validation(6)["val/loss"] == pytest.approx(losses[6])
    assert fit(run, tmp_path / "shards", *options, **during).code == 0  # the run ends with this validation anyway
    assert validation(12) == expected["metrics"]["validation"]

    # A run that was killed in this validation has no step left, but its validation.
    directory = CheckpointDirectory(run / "checkpoints", keep_last=2)
    directory.replace_metrics(run / "checkpoints" / "step-00000012", {**expected["metrics"], "validation": None})
    assert validation(12) is None
    again = fit(run, tmp_path / "shards", *options)
    assert again.code == 0 and "has done 12 of 12 steps" in again.err
    assert validation(12) == expected["metrics"]["validation"]
    assert results(run)["curves"]["val/loss"] == expected["curves"]["val/loss"]
