"""kill -9 at any instant, resume: bit-identical to the unbroken run (docs/architecture.md, Checkpoints)."""

import json
import math
import random
import signal
from pathlib import Path

import pytest
import torch
import yaml

from infini_train.training.module import InfiniModule
from tests.helpers.datasets import make_dataset
from tests.helpers.results import LENGTHS, assert_identical, results
from tests.helpers.runs import fit


def kill_and_resume(unbroken, run: Path, instants: list[int]) -> None:
    dataset, expected, _ = unbroken
    for instant in instants:  # each resumed run may be killed again
        killed = fit(run, dataset, die_at=instant)
        assert killed.code == -signal.SIGKILL, (
            f"instant {instant} of {killed.instants} was never reached: {killed.err}"
        )
    resumed = fit(run, dataset)
    assert resumed.code == 0, resumed.err
    found = results(run)
    # Lightning counts its own restarts and keeps progress of batches "started": not part of the training state.
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)
    assert_identical(found, expected)
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_killed_inside_a_save_and_between_steps(unbroken, tmp_path):
    save = unbroken[2] * 2 // 5  # well after the first checkpoint
    kill_and_resume(unbroken, tmp_path / "run", [save, save // 3])


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 10))])
def test_killed_at_a_random_instant(unbroken, tmp_path, seed):
    kill_and_resume(unbroken, tmp_path / "run", [random.Random(seed).randrange(1, unbroken[2] - 1)])


def test_logged_rates_are_those_of_the_step(unbroken):
    """5 steps of warm-up to 3e-4, then a cosine that reaches a tenth of it at step 20, the last."""
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * done / 14)) / 2 for done in range(15)]
    expected = [3e-4 * share for share in [*(step / 5 for step in range(1, 6)), *cosine]]
    rates = [rate for _, rate in unbroken[1]["curves"]["train/lr_matrices"]]
    assert rates == pytest.approx(expected, rel=1e-6)  # tensorboard keeps float32


def test_options_of_the_optimizer_count_when_a_run_resumes(unbroken, tmp_path):
    """Learning rates of 0 leave the weights as they are, whatever the checkpoint's rates were."""
    dataset, run = unbroken[0], tmp_path / "run"
    given = {"lr": 0.0, "gate_lr": 0.0, "weight_decay": 0.7, "betas": [0.5, 0.6], "eps": 1e-5}
    words = [word for name, value in given.items() for word in (f"--model.optimizer.{name}", str(value))]
    assert fit(run, dataset, "--trainer.max_steps", "3").code == 0
    before = results(run)["tensors"]
    assert fit(run, dataset, "--trainer.max_steps", "6", *words).code == 0
    after = results(run)
    for name, value in before.items():
        assert torch.equal(after["tensors"][name], value) == name.startswith("weight/"), name
    for group in after["state"]["groups"]:
        assert [group[name] for name in ("lr", "initial_lr", "eps")] == [0, 0, 1e-5]
        assert list(group["betas"]) == [0.5, 0.6]
        assert group["weight_decay"] == (0.7 if group["name"] == "matrices" else 0)
    other = fit(run, dataset, "--trainer.max_steps", "9", "--model.optimizer.name", "sgd")
    assert other.code == 2
    assert "model.optimizer.name: found sgd, expected adamw as in the checkpoint" in other.err


def test_options_of_initial_weights_stay_those_of_the_beginning(unbroken, tmp_path):
    """They change no trained weight, and the run's configuration does not say that they did."""
    dataset, run = unbroken[0], tmp_path / "run"
    assert fit(run, dataset, "--trainer.max_steps", "3", "--model.gate_init", "-2").code == 0
    other = ("--model.gate_init", "1", "--model.initializer_range", "0.5")
    assert fit(run, dataset, "--trainer.max_steps", "6", *other).code == 0
    told = InfiniModule(gate_init=1.0, initializer_range=0.5).prepare_to_resume(run / "checkpoints/step-00000003")
    assert "model.gate_init stays -2.0: 1.0 would only change initial weights" in told
    assert "model.initializer_range stays 0.02: 0.5 would only change initial weights" in told
    recorded = yaml.safe_load((run / "config.yaml").read_text())["model"]
    saved = json.loads((run / "checkpoints/step-00000006/model_config.json").read_text())
    for options in (recorded, saved):
        assert (options["gate_init"], options["initializer_range"]) == (-2, 0.02)


def test_a_run_that_is_asked_to_stop_inside_a_step_ends_the_step(unbroken, tmp_path):
    """As EarlyStopping and max_time ask. The resumed run has the bits of the unbroken one."""
    dataset, expected, _ = unbroken
    callback = "{class_path: tests.helpers.callbacks.StopInsideAStep, init_args: {batch: 6}}"
    stopped = fit(tmp_path / "run", dataset, "--trainer.callbacks", callback)
    assert stopped.code == 0, stopped.err
    assert results(tmp_path / "run")["step"] == "step-00000004"
    assert fit(tmp_path / "run", dataset).code == 0
    found = results(tmp_path / "run")
    for name in ("val/loss", "val/memory_share"):
        assert found["curves"].pop(name)[0][0] == 4  # Lightning validates before it ends a run early
    for part in ("tensors", "lanes", "cursor", "metrics"):
        assert_identical(found[part], expected[part], part)
    for name, curve in found["curves"].items():
        assert curve == expected["curves"][name]


@pytest.mark.slow
def test_accumulation_does_not_change_the_run(tmp_path):
    """The same lanes in 1, 2 or 4 micro-batches a step: same losses and weights. SGD hides no wrong scale."""
    make_dataset(tmp_path / "shards", LENGTHS)
    found = []
    for turns in (1, 2, 4):
        run = tmp_path / f"run{turns}"
        options = {"trainer.accumulate_grad_batches": turns, "data.micro_batch_size": 4 // turns}
        options |= {"model.optimizer.name": "sgd", "model.optimizer.lr": 0.3, "trainer.gradient_clip_val": 0.5}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        assert fit(run, tmp_path / "shards", *words).code == 0
        found.append(results(run))
    for other in found[1:]:
        assert other["cursor"] == found[0]["cursor"]
        for name in ("train/loss", "train/gradient_norm"):
            a, b = (torch.tensor([v for _, v in r["curves"][name]]) for r in (other, found[0]))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
        for name, value in found[0]["tensors"].items():
            torch.testing.assert_close(other["tensors"][name], value, rtol=1e-4, atol=1e-6)


def test_more_steps_for_a_run_that_ended_with_a_validation(tmp_path):
    """Constant rates, so that what was done does not depend on how many steps there were to do."""
    make_dataset(tmp_path / "shards", LENGTHS)
    constant = ("--model.optimizer.schedule", "wsd", "--model.optimizer.decay_steps", "0")
    for run, stops in (("whole", [12]), ("longer", [6, 12])):  # a validation follows step 6
        for steps in stops:
            found = fit(tmp_path / run, tmp_path / "shards", *constant, "--trainer.max_steps", str(steps))
            assert found.code == 0, found.err
    expected, found = results(tmp_path / "whole"), results(tmp_path / "longer")
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)
    assert_identical(found, expected)
