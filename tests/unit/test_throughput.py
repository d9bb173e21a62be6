"""What counts as working, as waiting for data, and as neither."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infini_train.training.callbacks import throughput
from infini_train.training.callbacks.throughput import Throughput
from infini_train.training.checkpoint import Checkpointer, Saving
from infini_train.training.module import InfiniModule

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "segment_length": 8}


def copies(measured: Throughput, trainer, module, directory: Path) -> None:
    measured.on_save_checkpoint(trainer, module, {})


def makes_latest(measured: Throughput, trainer, module, directory: Path) -> None:
    saver = Checkpointer(directory, measured)
    written: Future = Future()
    written.set_result({})
    saver.pending = Saving(written, directory / "step-00000002.tmp", directory / "step-00000002", {})
    saver._finish(trainer)


def validates(measured: Throughput, trainer, module, directory: Path) -> None:
    measured.on_validation_start(trainer, module)


@pytest.mark.parametrize("pause", [copies, makes_latest, validates])
def test_saves_and_validations_are_left_out(monkeypatch, tmp_path, pause):
    """Steps of 3 s, each after 1 s without data; a pause of 100 s between the second and the third."""
    logged, clock = [], SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    module = InfiniModule(**SIZES)
    trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, log_every_n_steps=4, world_size=1)
    trainer.is_global_zero = False  # rank 0 also renames and removes
    monkeypatch.setattr(InfiniModule, "trainer", trainer)
    monkeypatch.setattr(InfiniModule, "log_values", lambda self, values: logged.append(values))
    measured = Throughput()
    measured.peak = 1.0
    batch = {"input_ids": torch.zeros(2, 15)}
    for step in range(1, 5):
        clock.now += 1
        measured.on_train_batch_start(trainer, module, batch, step)
        clock.now += 3
        trainer.global_step = step
        measured.on_train_batch_end(trainer, module, None, batch, step)
        if step == 2:
            clock.now += 100
            pause(measured, trainer, module, tmp_path)
    (values,) = logged
    # No data were waited for before the first step, and it is not known how long before the third.
    assert values["speed/step_seconds"] == pytest.approx((4 * 3 + 2) / 4)
    assert values["speed/data_wait_share"] == pytest.approx(2 / (4 * 3 + 2))
    assert values["speed/tokens_per_second"] == pytest.approx(4 * 30 / (4 * 3 + 2))


def test_a_save_in_the_midst_of_a_batch(monkeypatch):
    """As a callback of the user may ask for it; that batch's time is left out."""
    monkeypatch.setattr(InfiniModule, "trainer", SimpleNamespace(accumulate_grad_batches=2))
    module, measured, batch = InfiniModule(**SIZES), Throughput(), {"input_ids": torch.zeros(2, 15)}
    measured.on_train_batch_start(None, module, batch, 0)
    measured.on_save_checkpoint(None, module, {})
    measured.on_train_batch_end(SimpleNamespace(world_size=1), module, None, batch, 0)
    assert (measured.working, measured.tokens) == (0, 30)
