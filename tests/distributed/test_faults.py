"""A rank that fails takes the job down soon, with its error last; nothing half-written becomes `latest`."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infini_train.training.callbacks.faults import Faults
from tests.helpers.datasets import make_dataset
from tests.helpers.job import run
from tests.helpers.results import LENGTHS, results


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults") / "shards"
    make_dataset(root, LENGTHS)
    return root


def latest(directory: Path) -> str:
    return (directory / "run" / "checkpoints" / "latest").read_text()


def last_line(err: str) -> str:
    return [line for line in err.strip().splitlines() if not line.startswith("instants passed")][-1]


@pytest.mark.parametrize("first", [None, "", "rank 1 of 2, step 0, lanes []: ValueError: a file is damaged"])
def test_a_rank_that_fails_after_another_tells_only_the_first_error(tmp_path, monkeypatch, capsys, first):
    """As where a launcher started each rank, and does not end the others at once."""
    monkeypatch.setattr(os, "_exit", lambda code: None)
    trainer = SimpleNamespace(world_size=2, global_rank=0, global_step=0, strategy=SimpleNamespace(launcher=None))
    if first is not None:  # empty where the disk was full
        (tmp_path / "first-error.txt").write_text(first)
    faults = Faults(tmp_path / "first-error.txt", 100.0, (ValueError,))
    faults.on_exception(trainer, None, RuntimeError("Connection reset by peer"))
    printed = capsys.readouterr().err
    own = "rank 0 of 2, step 0, lanes []: RuntimeError: Connection reset by peer"
    assert last_line(printed) == f"infini-train: error: {first or own}"
    assert (len(printed.splitlines()) == 1) == (first is not None)


def test_a_run_may_end_while_it_is_watched(tmp_path):
    """The training thread takes the deadline back between two looks of the watching thread."""
    looks = iter([math.inf, None, None])

    class Ending(Faults):
        deadline = property(lambda self: next(looks), lambda self, value: None)

    Ending(tmp_path, 0.1, ())._watch(None)
    assert next(looks, "all seen") is None


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_raises(dataset, tmp_path, strategy, rank):
    job = run(tmp_path / "run", dataset, 2, strategy, fault=(rank, "raise", 8))
    assert job.code != 0
    lanes = [[0, 1], [2, 3]][rank]
    assert last_line(job.err) == (
        f"infini-train: error: rank {rank} of 2, step 7, lanes {lanes}: RuntimeError: planted"
    ), job.err
    assert latest(tmp_path) in ("step-00000003", "step-00000006")  # the second may still have been under way
    assert run(tmp_path / "run", dataset, 2, strategy).code == 0


@pytest.mark.slow
def test_a_mistake_of_the_user(dataset, tmp_path):
    job = run(tmp_path / "run", dataset, 2, "zero2", "--data.lanes", "6")
    assert job.code == 2
    assert "Traceback" not in job.err
    assert "ValueError: data.lanes: found 6, expected micro_batch_size * world size" in last_line(job.err)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_hangs(dataset, tmp_path, rank):
    job = run(tmp_path / "run", dataset, 2, "zero2", "--hang_timeout", "10", fault=(rank, "hang", 8), timeout=90)
    assert job.code != 0
    assert "step 7, lanes" in last_line(job.err) and "no micro-batch finished in 10 s" in last_line(job.err), job.err
    assert "job.py" in job.err  # the stack of the one that hangs


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_loss_that_is_no_number(dataset, tmp_path, strategy):
    """All ranks stop before the step; the dump of the faulty rank replays its batch."""
    job = run(tmp_path / "run", dataset, 2, strategy, fault=(1, "nan", 8))
    assert job.code != 0
    assert "NonFiniteError: step 7, rank" in last_line(job.err), job.err
    assert latest(tmp_path) in ("step-00000003", "step-00000006")
    dump = torch.load(tmp_path / "run" / "nonfinite-step-00000007-rank-00001.pt", weights_only=True)
    assert dump[0]["lane_ids"].tolist() == [2, 3]
    again = run(tmp_path / "run", dataset, 2, strategy)
    assert again.code == 0, again.err


@pytest.mark.slow
def test_a_step_left_out(dataset, tmp_path):
    """By us under DDP, by DeepSpeed under ZeRO: with the same outcome, and the run goes on."""
    found = []
    for strategy in ("ddp", "zero2", "zero3"):
        directory = tmp_path / strategy
        job = run(directory, dataset, 2, strategy, "--nonfinite", "skip", fault=(1, "nan", 8))
        assert job.code == 0, job.err
        assert "left out step 7, rank 1: found loss" in job.err
        assert (directory / "nonfinite-step-00000007-rank-00001.pt").is_file()
        found.append(results(directory))
    for other in found[1:]:
        for name, value in found[0]["tensors"].items():
            torch.testing.assert_close(other["tensors"][name], value, rtol=1e-4, atol=1e-4, msg=name)
    steps = [value for name, value in found[0]["tensors"].items() if name.startswith("step/")]
    assert all(step == 19 for step in steps)  # of 20


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_disk_full_in_a_save(dataset, tmp_path, rank):
    job = run(tmp_path / "run", dataset, 2, "zero1", fault=(rank, "disk full", 5))
    assert job.code != 0
    assert "No space left on device" in last_line(job.err), job.err
    assert latest(tmp_path) == "step-00000006"  # two files a save: it was the third that failed
    assert run(tmp_path / "run", dataset, 2, "zero1").code == 0
