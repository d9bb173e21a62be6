"""DeepSpeed ZeRO on real processes (gloo) against one process: losses, weights, and resumes at any world size."""

import json
import random
from functools import cache

import pytest
import torch

from infini_train.hf.export import write_model
from infini_train.model import InfiniForCausalLM
from infini_train.run_files import latest
from infini_train.training.checkpoint_format import read_model
from tests.helpers.datasets import make_dataset
from tests.helpers.job import run
from tests.helpers.results import LENGTHS, assert_identical, check_same, results

STAGES = ("zero1", "zero2", "zero3")
SGD = ("--model.optimizer.name", "sgd", "--model.optimizer.lr", "0.3", "--trainer.gradient_clip_val", "0.5")
SGD += ("--model.tie_word_embeddings", "true", "--model.memory", "selective-delta", "--model.write_cost", "0.5")
SGD += ("--model.write_cost_from", "5")
MUON = ("--model.optimizer.name", "muon", "--trainer.gradient_clip_val", "0.5")
MUON += ("--model.tie_word_embeddings", "true", "--model.memory", "selective-delta")
OPTIONS = {"adamw": (), "muon": MUON, "sgd": SGD}
# Of losses and weights. Muon orthogonalises in bfloat16, so a gradient's last digits may show in three digits of the
# update.
TOLERANCES = {"adamw": {}, "muon": {"loss": 3e-4, "weights": 1e-3}, "sgd": {"loss": 5e-5}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("zero") / "shards"
    make_dataset(root, LENGTHS)
    return root


@pytest.fixture(scope="module")
def alone(dataset):
    """Results of one process with an optimizer: what every other way of running must give."""

    @cache
    def found(optimizer: str) -> dict:
        job = run(dataset.parent / optimizer, dataset, 1, None, *OPTIONS[optimizer], accumulate=2)
        assert job.code == 0, job.err
        return results(dataset.parent / optimizer)

    return found


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [
        ("adamw", "zero3"),
        *(pytest.param("adamw", s, marks=pytest.mark.slow) for s in ("zero1", "zero2")),
        *(pytest.param("muon", s, marks=pytest.mark.slow) for s in ("ddp", *STAGES)),
    ],
)
def test_two_ranks_equal_one(dataset, alone, tmp_path, optimizer, strategy):
    job = run(tmp_path / "run", dataset, 2, strategy, *OPTIONS[optimizer])
    assert job.code == 0, job.err
    check_same(results(tmp_path / "run"), alone(optimizer), **TOLERANCES[optimizer])


@pytest.mark.parametrize(
    ("strategy", "ranks", "accumulate"),
    [
        ("ddp", 2, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("ddp", 2, 2),
                ("zero1", 1, 4),
                ("zero2", 4, 1),
                *((s, 2, a) for s in STAGES for a in (1, 2)),
            ]
        ),
    ],
)
def test_sgd_with_clipping_and_accumulation(dataset, alone, tmp_path, strategy, ranks, accumulate):
    """Adam hides a wrong scale of gradients, SGD does not."""
    job = run(tmp_path / "run", dataset, ranks, strategy, *SGD, accumulate=accumulate)
    assert job.code == 0, job.err
    check_same(results(tmp_path / "run"), alone("sgd"), loss=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("strategy", ["ddp", *STAGES])
def test_chunks_of_windows(dataset, alone, tmp_path, strategy, recompute):
    """Two ranks whose windows of 4 segments run in chunks of one, the layers recomputed inside or not, against whole
    windows in one process."""
    options = ("--model.segments_per_chunk", "1", "--model.activation_checkpointing", recompute)
    job = run(tmp_path / "run", dataset, 2, strategy, *SGD, *options)
    assert job.code == 0, job.err
    check_same(results(tmp_path / "run"), alone("sgd"), loss=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_options_of_the_optimizer_count_when_a_run_resumes(dataset, tmp_path, strategy):
    """Learning rates of 0 leave the weights as they are, whatever the checkpoint's rates were."""
    frozen = ("--model.optimizer.lr", "0", "--model.optimizer.gate_lr", "0", "--model.optimizer.betas", "[0.5,0.6]")
    found = []
    for options in (("--trainer.max_steps", "3"), ("--trainer.max_steps", "6", *frozen)):
        job = run(tmp_path / "run", dataset, 2, strategy, *options)
        assert job.code == 0, job.err
        found.append(results(tmp_path / "run"))
    for name, value in found[0]["tensors"].items():
        assert torch.equal(found[1]["tensors"][name], value) == name.startswith("weight/"), name
    for group in found[1]["state"]["groups"]:
        assert (group["lr"], group["initial_lr"], *group["betas"]) == (0, 0, 0.5, 0.6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "first", "then"),
    [
        ("adamw", ("zero2", 2, 1), (None, 1, 2)),
        ("adamw", (None, 1, 2), ("zero2", 2, 1)),
        ("adamw", ("zero1", 2, 1), ("zero1", 4, 1)),
        ("adamw", ("zero3", 2, 1), ("zero1", 2, 1)),
        ("adamw", ("ddp", 2, 1), ("zero3", 4, 1)),
        ("adamw", ("zero3", 4, 1), ("zero3", 1, 4)),
        ("adamw", ("zero3", 2, 1), ("ddp", 2, 1)),
        ("muon", ("zero2", 2, 1), (None, 1, 2)),
        ("muon", ("zero3", 2, 1), ("zero1", 4, 1)),
        ("muon", ("ddp", 2, 1), ("zero3", 4, 1)),
    ],
)
def test_resumed_at_another_world_size_or_stage(dataset, alone, tmp_path, optimizer, first, then):
    for (strategy, ranks, accumulate), steps in ((first, 10), (then, 20)):
        options = (*OPTIONS[optimizer], "--trainer.max_steps", str(steps))
        job = run(tmp_path / "run", dataset, ranks, strategy, *options, accumulate=accumulate)
        assert job.code == 0, job.err
    check_same(results(tmp_path / "run"), alone(optimizer), steps=10, **TOLERANCES[optimizer])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "recomputed"),
    [
        ("sgd", ("--model.activation_checkpointing", "true")),
        ("sgd", ("--model.segments_per_chunk", "3")),
        ("muon", ("--model.activation_checkpointing", "true")),
    ],
)
def test_offload_and_recomputation(dataset, alone, tmp_path, optimizer, recomputed):
    (tmp_path / "offload.json").write_text(
        json.dumps(
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu"},
                    "offload_param": {"device": "cpu"},
                }
            }
        )
    )
    strategy = (
        f"{{class_path: infini_train.training.strategy.ZeroStrategy, init_args: {{config: {tmp_path}/offload.json}}}}"
    )
    job = run(tmp_path / "run", dataset, 2, strategy, *OPTIONS[optimizer], *recomputed)
    assert job.code == 0, job.err
    check_same(results(tmp_path / "run"), alone(optimizer), **TOLERANCES[optimizer])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("strategy", STAGES)
def test_bfloat16_resumes_exactly(dataset, tmp_path, strategy, optimizer):
    """Master weights are float32 in the checkpoint, so nothing is lost to rounding."""
    found = []
    for name, stops in (("unbroken", (8,)), ("resumed", (5, 8))):
        for steps in stops:
            options = (*OPTIONS[optimizer], "--trainer.precision", "bf16-mixed", "--trainer.max_steps", str(steps))
            job = run(tmp_path / name, dataset, 2, strategy, *options)
            assert job.code == 0, job.err
        found.append(results(tmp_path / name))
        del found[-1]["state"]["loops"], found[-1]["state"]["epoch"]  # Lightning counts its own restarts
        found[-1]["curves"].pop("train/lr_matrices")  # of the next step, which a run that ends at 5 has not
    assert {x.dtype for x in found[0]["tensors"].values()} == {torch.float32}
    assert_identical(found[1], found[0])


@pytest.mark.slow
def test_export_of_split_and_tied_weights(dataset, alone, tmp_path):
    """What ZeRO-3 trained on two ranks loads in transformers as what one process trained."""
    job = run(tmp_path / "run", dataset, 2, "zero3", *SGD)
    assert job.code == 0, job.err
    config, weights = read_model(latest(tmp_path / "run" / "checkpoints"))
    write_model(config, weights, tmp_path / "export", source=tmp_path, add_files=lambda directory: None)
    model = InfiniForCausalLM.from_pretrained(tmp_path / "export")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, p in model.named_parameters():
        expected = alone("sgd")["tensors"][f"weight/model.{name}"].view_as(p)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def unbroken(dataset):
    found = {}
    for stage in STAGES:
        job = run(dataset.parent / f"unbroken-{stage}", dataset, 2, stage, fault=(1, "count", 0))
        assert job.code == 0, job.err
        found[stage] = results(dataset.parent / f"unbroken-{stage}"), job.instants
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_one_rank_killed_at_a_random_instant(dataset, unbroken, tmp_path, seed):
    """kill -9 of one of two ranks, resume: bit-identical, all ranks' memories and cursors included."""
    draw, stage = random.Random(seed), STAGES[seed % 3]
    expected, instants = unbroken[stage]
    rank, when = draw.randrange(2), draw.randrange(1, instants - 1)
    job = run(tmp_path / "run", dataset, 2, stage, fault=(rank, "kill", when))
    assert job.code != 0
    job = run(tmp_path / "run", dataset, 2, stage)
    assert job.code == 0, job.err
    found = results(tmp_path / "run")
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)
    assert_identical(found, expected)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
