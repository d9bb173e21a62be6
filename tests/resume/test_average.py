"""The moving average of the weights: against a plain loop, over a kill, in validation and export, under ZeRO."""

import signal
from pathlib import Path

import pytest
import torch
from lightning import Trainer

from infini_train.cli import train
from infini_train.data.datamodule import LaneDataModule
from infini_train.hf.commands import export
from infini_train.model.loading import read_safetensors
from infini_train.training.checkpoint_io import DirectoryIO
from infini_train.training.module import InfiniModule
from infini_train.training.optim import OptimizerOptions
from tests.helpers.job import run as job
from tests.helpers.results import assert_identical, results, tensors
from tests.helpers.runs import fit

DATA = Path(__file__).parents[1] / "fixtures" / "data"
DECAY, STEPS = 0.7, 6
OPTIONS = ["--model.vocab_size", "288", "--trainer.max_steps", str(STEPS), "--model.optimizer.lr", "0.01"]
OPTIONS += ["--checkpoint.every_n_steps", "1", "--checkpoint.keep_last", "9"]
AVERAGE = ["--model.optimizer.ema_decay", str(DECAY)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("average")
    done = fit(root / "run", DATA, *OPTIONS, *AVERAGE)
    assert done.code == 0, done.err
    return root / "run", done.instants


def averaged(run: Path) -> dict[str, torch.Tensor]:
    """The average by a plain loop over the weights of all checkpoints, in float64."""
    average: dict[str, torch.Tensor] = {}
    for step in range(1, STEPS + 1):
        saved = tensors(run / "checkpoints" / f"step-{step:08d}")
        for key, value in saved.items():
            kind, _, name = key.partition("/")
            if kind == "weight":
                old = average.get(name, value.double())
                average[name] = DECAY * old + (1 - DECAY) * value.double()
    return average


def test_it_is_the_average_and_training_does_not_notice(whole, tmp_path):
    run, _ = whole
    last = tensors(run / "checkpoints" / f"step-{STEPS:08d}")
    expected = averaged(run)
    assert {key.partition("/")[2] for key in last if key.startswith("ema/")} == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(last[f"ema/{name}"].double(), value, rtol=1e-5, atol=1e-7, msg=name)
    name = "model.model.embed_tokens.weight"
    assert not torch.allclose(last[f"ema/{name}"], last[f"weight/{name}"])
    assert fit(tmp_path / "plain", DATA, *OPTIONS).code == 0
    plain = tensors(tmp_path / "plain" / "checkpoints" / f"step-{STEPS:08d}")
    assert_identical(plain, {key: value for key, value in last.items() if not key.startswith("ema/")})


def test_killed_and_resumed(whole, tmp_path):
    run, instants = whole
    killed = fit(tmp_path / "run", DATA, *OPTIONS, *AVERAGE, die_at=instants * 3 // 5)
    assert killed.code == -signal.SIGKILL
    assert fit(tmp_path / "run", DATA, *OPTIONS, *AVERAGE).code == 0
    assert_identical(results(tmp_path / "run")["tensors"], results(run)["tensors"])


def test_validated_and_exported(whole, tmp_path, capsys):
    run, _ = whole
    average = averaged(run)
    config = ["--config", str(run / "config.yaml"), "--trainer.accelerator", "cpu", "--ckpt_path", str(run)]
    found = {}
    for name, more in (("ema", ["--weights", "ema"]), ("trained", [])):
        found[name] = train(args=["validate", *config, *more]).trainer.callback_metrics["val/loss"].item()
    shown = capsys.readouterr().out
    assert f"validating the averaged weights of {run}/checkpoints/step-{STEPS:08d}" in shown

    sizes = {"vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    module = InfiniModule(**sizes, num_attention_heads=4, num_key_value_heads=2, segment_length=8)
    module.configure_model()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(average[name].view_as(p))
    data = LaneDataModule("none", str(DATA), segment_length=8, segments_per_window=4, num_workers=0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, plugins=[DirectoryIO()], **quiet)
    trainer.validate(module, data)
    assert found["ema"] == pytest.approx(trainer.callback_metrics["val/loss"].item(), rel=1e-5)
    assert abs(found["ema"] - found["trained"]) > 1e-3

    export(run, tmp_path / "out", weights="ema")
    exported = read_safetensors(tmp_path / "out")
    for name, value in average.items():
        torch.testing.assert_close(
            exported[name.removeprefix("model.")].double().flatten(), value, rtol=1e-5, atol=1e-7, msg=name
        )
    assert "exponential moving average (decay 0.7)" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_begins_from_the_average(whole, tmp_path):
    run, _ = whole
    still = ["--trainer.max_steps", "1", "--model.optimizer.lr", "0", "--model.optimizer.gate_lr", "0"]
    begun = fit(tmp_path / "next", DATA, *OPTIONS, *still, "--ckpt_path", str(run), "--restore", "ema")
    assert begun.code == 0, begun.err
    found = results(tmp_path / "next")["tensors"]
    for name, value in averaged(run).items():
        torch.testing.assert_close(found[f"weight/{name}"].double(), value, rtol=1e-5, atol=1e-7, msg=name)


def test_a_run_without_it_drops_it(whole, tmp_path):
    run, _ = whole
    with pytest.raises(ValueError, match=r"expected between 0 and 1, or none"):
        InfiniModule(optimizer=OptimizerOptions(ema_decay=1.0))
    done = fit(tmp_path / "run", DATA, *OPTIONS, "--ckpt_path", str(run / "checkpoints" / "step-00000003"))
    assert done.code == 0, done.err
    found = results(tmp_path / "run")["tensors"]
    assert not [key for key in found if key.startswith("ema/")]
    with pytest.raises(ValueError, match="found no average of the weights in it; a run keeps one"):
        export(tmp_path / "run", tmp_path / "out", weights="ema")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    done = job(run, DATA, 1, None, *OPTIONS, *AVERAGE, "--model.optimizer.name", "sgd")
    assert done.code == 0, done.err
    return run


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_two_ranks_keep_the_average_of_one(alone, tmp_path, strategy):
    """Over a resume, too: by the other strategy from step 4 on."""
    more = [*OPTIONS, *AVERAGE, "--model.optimizer.name", "sgd"]
    other = "ddp" if strategy != "ddp" else "zero3"
    for steps, how in ((4, strategy), (STEPS, other)):
        done = job(tmp_path / "two", DATA, 2, how, *more, "--trainer.max_steps", str(steps))
        assert done.code == 0, done.err
    one, two = results(alone)["tensors"], results(tmp_path / "two")["tensors"]
    assert one.keys() == two.keys()
    assert any(key.startswith("ema/") for key in one)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6, msg=key)
