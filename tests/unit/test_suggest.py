"""`plan --suggest`: the fastest setting that fits, against all settings counted one by one."""

import json
from itertools import product

import pytest

from infini_train import plan
from infini_train.cli import train
from infini_train.data.datamodule import trainer_faults
from infini_train.model.flops import flops_per_token, parameters
from infini_train.training import footprint
from infini_train.training.footprint import Setting, setting_of
from infini_train.training.strategy import ZeroStrategy

CONFIG = """
model: {vocab_size: 1000, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 2,
        num_key_value_heads: 1, memory: selective-delta}
data: {segment_length: 16, segments_per_window: 8, lanes: 8, micro_batch_size: 1}
trainer: {max_steps: 10, accumulate_grad_batches: 2, precision: bf16-mixed}
"""
GPUS, LANES, SEGMENT, WINDOW = 4, 8, 16, 128
NAMES = ["data.micro_batch_size", "data.context_parallel", "trainer.accumulate_grad_batches", "trainer.strategy"]
NAMES += ["model.activation_checkpointing", "model.segments_per_chunk"]


def activations(config, setting: Setting) -> float:
    """In place of the count, which takes seconds: what is held of the window, the memories before its chunks, and a
    constant."""
    held = setting.rows * setting.window / setting.chunks * (0.2 if setting.activation_checkpointing else 1)
    return 1e4 * held + 2e5 * setting.rows * setting.chunks + 1e6


@pytest.fixture
def config(tmp_path, monkeypatch):
    for module in (plan, footprint):
        monkeypatch.setattr(module, "activations", activations)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return str(tmp_path / "config.yaml")


def suggested(capsys, config: str, gib: float, *words: str) -> dict[str, str] | None:
    assert plan.main(
        ["--config", config, "--gpus_per_node", str(GPUS), "--gpu_memory_gib", str(gib), "--suggest", *words]
    ) in (0, None)
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])["suggested"]
    if found is not None:  # the line above is what `fit` takes
        assert out[-2].split()[4:] == [word for name, value in found.items() for word in (f"--{name}", value)]
    return found


@pytest.mark.parametrize("mib", [3, 5, 9, 40])
def test_nothing_that_fits_is_faster(capsys, config, mib):
    found = suggested(capsys, config, mib / 1024)
    model, fitting = train(plan.Planned, ["fit", "--data.train", "unknown", "--config", config]).model.config, {}
    for rows, parallel, stage, recompute, chunk in product(
        (1, 2, 4, 8), (1, 2, 4), range(4), (False, True), (None, 1, 2, 4)
    ):
        lanes, window = LANES * parallel // GPUS, WINDOW // parallel
        if lanes % rows or (parallel > 1 and chunk):
            continue
        zero = ZeroStrategy(stage=stage).config["zero_optimization"] if stage else {}
        setting = Setting(zero, GPUS, rows, window, lanes, True, recompute, gpu=True, chunk=chunk and chunk * SEGMENT)
        if sum(footprint.states(model, setting).values()) + activations(model, setting) > 0.9 * mib * 2**20:
            continue
        words = rows, parallel, lanes // rows, f"zero{stage}" if stage else "ddp", recompute, chunk or "null"
        options = tuple(str(word).lower() for word in words)
        fitting[options] = plan.step_seconds(model, setting, lanes // rows, parallel, 0.4 * 989e12, 50e9)
    assert (found is None) == (not fitting)
    if found:
        assert fitting[tuple(found.values())] == min(fitting.values())


def test_fit_takes_what_is_suggested(capsys, config):
    """The options as printed give the lanes of the configuration, and the setting that was counted."""
    found = suggested(capsys, config, 5 / 1024)
    assert found is not None and list(found) == NAMES
    words = [word for name, value in found.items() for word in (f"--{name}", value)]
    words += ["--trainer.devices", str(GPUS)]
    cli = train(plan.Planned, ["fit", "--data.train", "unknown", "--config", config, *words])
    assert not trainer_faults(cli.trainer, LANES, cli.datamodule.micro_batch_size, cli.datamodule.context_parallel)
    setting = setting_of(cli.trainer, cli.model, cli.datamodule, gpu=True)
    assert sum(footprint.states(cli.model.config, setting).values()) + activations(None, setting) <= 0.9 * 5 * 2**20


def test_seconds_of_a_step(config):
    """By hand: four chunks are three quarters of another forward pass; ZeRO-3 gathers bf16 weights for 4 forward
    passes, 3 repeated ones and 4 backward passes, and reduces bf16 gradients once a micro-batch."""
    model = train(plan.Planned, ["fit", "--data.train", "unknown", "--config", config]).model.config
    setting = Setting({"stage": 3}, GPUS, 1, WINDOW, 2, True, False, gpu=True, chunk=2 * SEGMENT)
    computing = 2 * WINDOW * flops_per_token(model) * (1 + 0.75 / 3) / 1e12
    sending = 2 * (11 + 1) * 2 * parameters(model) * (GPUS - 1) / GPUS / 1e9
    assert plan.step_seconds(model, setting, 2, 1, 1e12, 1e9) == pytest.approx(computing + sending, rel=1e-12)
