"""kill -9 at any instant, resume: bit-identical to the unbroken run (DESIGN section 6)."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tests.helpers.datasets import make_dataset
from tests.resume.driver import fit

# Documents shorter and longer than the window of 32, several epochs in 20 steps of 4 lanes.
LENGTHS = [300, 45, 7, 120, 64, 33, 500, 20, 90, 211]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state, 1-D, put together from the pieces of all ranks."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for file in checkpoint.glob("state-*.safetensors"):
        for key, value in load_file(file).items():
            kind, name, *start = key.split("/")
            pieces.setdefault(f"{kind}/{name}", {})[int(*start)] = value
    return {
        key: torch.cat([of[start] for start in sorted(of)]) if of[0].dim() else of[0] for key, of in pieces.items()
    }


def logged_losses(run: Path) -> list[list[tuple[int, float]]]:
    """Steps and losses as each process of the run that trained logged them, steps done again included."""
    files = [list(EventFileLoader(str(file)).Load()) for file in (run / "tensorboard").glob("events.*")]
    files.sort(key=lambda events: events[0].wall_time)  # the names tell whole seconds only
    found = []
    for events in files:
        values = [(event.step, value) for event in events for value in event.summary.value]
        found.append([(step, v.tensor.float_val[0]) for step, v in values if v.tag == "train/loss"])
    return [values for values in found if values]


def results(run: Path) -> dict:
    """All that a run leaves behind, read without the project's code."""
    last = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = ("train/loss", "train/gradient_norm", "train/lr_matrices", "memory/M_norm_max", "val/loss")
    there = set(names) & set(events.Tags()["scalars"])  # not every run validates
    return {
        "step": last.name,
        "state": torch.load(last / "state.ckpt", weights_only=True),
        "tensors": tensors(last),
        "lanes": {file.name: load_file(file) for file in sorted(last.glob("lanes-*.safetensors"))},
        "cursor": json.loads((last / "cursor.json").read_text()),
        "metrics": json.loads((last / "metrics.json").read_text()),
        # A validation that was cut off after it was logged is logged once more: the same point.
        "curves": {name: sorted({(e.step, e.value) for e in events.Scalars(name)}) for name in there},
    }


def assert_identical(a, b, path="result") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


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
    for result in (expected, found):
        result["curves"].pop("train/lr_matrices")  # of the next step, which a run that ends has not
    assert_identical(found, expected)
