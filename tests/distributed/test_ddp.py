"""Two real processes (DDP over gloo) against one: same lanes, same losses, same weights, also over a resume."""

import pytest
import torch

from tests.helpers.datasets import make_dataset
from tests.helpers.job import CONSTANT, run
from tests.helpers.results import LENGTHS, assert_identical, results, tensors
from tests.helpers.runs import fit


def test_two_ranks_equal_one(tmp_path):
    make_dataset(tmp_path / "shards", LENGTHS)
    alone = fit(tmp_path / "one", tmp_path / "shards", *CONSTANT)
    assert alone.code == 0, alone.err
    for steps in (9, 20):  # stops, and is resumed from its two ranks' lane files
        job = run(tmp_path / "two", tmp_path / "shards", 2, "ddp", "--trainer.max_steps", str(steps))
        assert job.code == 0, job.err
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one["cursor"] == two["cursor"]
    assert [s for s, _ in two["curves"]["train/loss"]] == list(range(1, 21))
    losses = [torch.tensor([v for _, v in r["curves"]["train/loss"]]) for r in (one, two)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for name, value in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_four_ranks_resume_to_the_bit(tmp_path):
    """The order in which more than two shares are added must not depend on when a process began."""
    make_dataset(tmp_path / "shards", LENGTHS)
    for name, stops in (("whole", [8]), ("parts", [3, 5, 8])):
        for steps in stops:
            job = run(tmp_path / name, tmp_path / "shards", 4, "ddp", "--trainer.max_steps", str(steps))
            assert job.code == 0, job.err
    whole, parts = (tensors(tmp_path / name / "checkpoints/step-00000008") for name in ("whole", "parts"))
    assert_identical(parts, whole)
