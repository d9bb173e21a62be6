"""`infini-train fit` on one GPU: killed and resumed to the bit, and under DeepSpeed ZeRO (nccl)."""

import signal

import pytest

from tests.helpers.datasets import make_dataset
from tests.helpers.job import run
from tests.helpers.results import assert_identical, check_same, results

# Heads, segments and batches of a size at which kernels split their work, whose order may then vary.
SIZES = ("--model.hidden_size", "256", "--model.intermediate_size", "704", "--data.segment_length", "512")
SIZES += ("--model.memory", "selective-delta", "--trainer.accelerator", "gpu")
MIXED = ("--trainer.precision", "bf16-mixed")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu") / "shards"
    make_dataset(root, [20_000, 3_000, 500, 9_000, 2_048, 50_000, 700])
    return root


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_killed_and_resumed_to_the_bit(dataset, tmp_path, precision, compiled):
    words = (*SIZES, "--trainer.precision", precision, "--model.compile", compiled)
    whole = run(tmp_path / "whole", dataset, 1, None, *words, timeout=250)  # compiling takes its time
    assert whole.code == 0, whole.err
    killed = run(tmp_path / "run", dataset, 1, None, *words, fault=(0, "kill", whole.instants // 2))
    assert killed.code == -signal.SIGKILL
    resumed = run(tmp_path / "run", dataset, 1, None, *words, timeout=250)
    assert resumed.code == 0, resumed.err
    expected, found = results(tmp_path / "whole"), results(tmp_path / "run")
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)  # Lightning's counts of its own restarts
    assert_identical(found, expected)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_equals_ddp(dataset, tmp_path, strategy):
    for name in ("ddp", strategy):
        job = run(tmp_path / name, dataset, 1, name, *SIZES)
        assert job.code == 0, job.err
    check_same(results(tmp_path / strategy), results(tmp_path / "ddp"), loss=1e-4, weights=1e-3)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_in_bfloat16_stopped_and_resumed_to_the_bit(dataset, tmp_path, strategy):
    jobs = {"whole": ["20"], "run": ["9", "20"]}  # steps of each start
    for name, stops in jobs.items():
        for steps in stops:
            job = run(tmp_path / name, dataset, 1, strategy, *SIZES, *MIXED, "--trainer.max_steps", steps)
            assert job.code == 0, job.err
    expected, found = results(tmp_path / "whole"), results(tmp_path / "run")
    assert_identical(found["tensors"], expected["tensors"])
    assert_identical(found["lanes"], expected["lanes"])
