"""Training in bfloat16 and with compiled layers, by the command line, against plain float32."""

import pytest
import torch

from tests.helpers.datasets import make_dataset
from tests.helpers.results import LENGTHS, results
from tests.helpers.runs import fit


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A dataset, and what plain training on it logs."""
    directory = tmp_path_factory.mktemp("plain")
    make_dataset(directory / "shards", LENGTHS)
    return directory / "shards", curves(directory / "run", directory / "shards")


def curves(run, dataset, *extra: str) -> dict[str, torch.Tensor]:
    options = ("--trainer.max_steps", "8", "--trainer.gradient_clip_val", "0.5", "--trainer.val_check_interval", "8")
    found = fit(run, dataset, *options, "--model.memory", "selective-delta", *extra)
    assert found.code == 0, found.err
    assert "WON'T CONVERT" not in found.err  # torch's words where it does not compile after all
    return {name: torch.tensor([v for _, v in points]) for name, points in results(run)["curves"].items()}


def test_bf16_mixed(plain, tmp_path):
    """In one process, without DeepSpeed: gradients are clipped, too."""
    dataset, expected = plain
    found = curves(tmp_path / "run", dataset, "--trainer.precision", "bf16-mixed")
    for name in ("train/loss", "train/gradient_norm", "val/loss"):
        torch.testing.assert_close(found[name], expected[name], rtol=2e-2, atol=0)
    assert not torch.equal(found["train/loss"], expected["train/loss"])


@pytest.mark.slow
def test_compiled(plain, tmp_path):
    """Windows in which documents begin, or none, inside segments and at their borders; memory_dropout; validation."""
    dataset, expected = plain
    found = curves(tmp_path / "run", dataset, "--model.compile", "true")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=0)


def test_compiled_layers_refuse_zero3(plain, tmp_path):
    words = ("--model.compile", "true", "--trainer.strategy", "zero3")
    refused = fit(tmp_path / "run", plain[0], *words)
    assert refused.code == 2 and "model.compile: found true, expected false with ZeRO-3" in refused.err
