"""Two real processes (DDP over gloo) against one: same lanes, same losses, same weights, also over a resume."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.resume.driver import arguments, fit
from tests.resume.test_resume import LENGTHS, results
from tests.synthetic import make_dataset

# The same rates in a run of 9 steps and one of 20, but what follows step 9: 0.1 of the peak if the run ends there.
CONSTANT = ["--model.optimizer.schedule", "wsd", "--model.optimizer.decay_steps", "0"]


def fit_on_two(run: Path, dataset: Path, steps: int) -> None:
    words = [*arguments(run, dataset), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    words += ["--trainer.accumulate_grad_batches", "1", "--trainer.max_steps", str(steps), *CONSTANT]
    done = subprocess.run(
        [sys.executable, "-m", "infini_train.cli", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr


def test_two_ranks_equal_one(tmp_path):
    make_dataset(tmp_path / "shards", LENGTHS)
    alone = fit(tmp_path / "one", tmp_path / "shards", *CONSTANT)
    assert alone.code == 0, alone.err
    for steps in (9, 20):  # stops, and is resumed from its two ranks' lane files
        fit_on_two(tmp_path / "two", tmp_path / "shards", steps)
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one["cursor"] == two["cursor"]
    assert [s for s, _ in two["curves"]["train/loss"]] == list(range(1, 21))
    losses = [torch.tensor([v for _, v in r["curves"]["train/loss"]]) for r in (one, two)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for name, value in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][name], value, rtol=1e-4, atol=1e-4)
