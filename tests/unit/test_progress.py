"""Plain lines of progress say what tensorboard is told, and not more often than every ten seconds."""

import re

import pytest
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.data.datamodule import LaneDataModule
from infini_train.training.callbacks import progress
from infini_train.training.callbacks.memory_metrics import MemoryMetrics
from infini_train.training.callbacks.progress import ModelSize, ProgressLines
from infini_train.training.callbacks.step_guard import StepGuard
from infini_train.training.callbacks.throughput import Throughput
from infini_train.training.callbacks.train_metrics import TrainMetrics
from infini_train.training.checkpoint_io import DirectoryIO
from infini_train.training.module import InfiniModule
from tests.helpers.datasets import make_dataset

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LINE = re.compile(
    r"step +(\d+)/12  ([ \d.]{4,5})%  loss (\d+\.\d{4})(?:  ([\d,]+) tokens/s)?"
    r"  elapsed (\d+):(\d\d):(\d\d)(?:  ends in (\d+):(\d\d):(\d\d))?"
)


class Clock:
    """Advances by so many seconds whenever it is asked."""

    def __init__(self, seconds: float):
        self.now, self.seconds = 0.0, seconds

    def monotonic(self) -> float:
        self.now += self.seconds
        return self.now


def seconds(hours: str, minutes: str, rest: str) -> int:
    return int(hours) * 3600 + int(minutes) * 60 + int(rest)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("progress") / "shards"
    make_dataset(root, [300, 45, 7, 120], vocab_size=40)
    return str(root)


def lines(run, dataset, capsys, monkeypatch, *, clock: float, fail_at: int | None = None) -> tuple[list[str], dict]:
    """What a real fit of 12 steps prints, and its curves by tag and step as tensorboard reads them."""
    monkeypatch.setattr(progress, "time", Clock(clock))
    module = InfiniModule(**SIZES, num_attention_heads=2, num_key_value_heads=1, segment_length=8)
    data = LaneDataModule(
        dataset, dataset, segment_length=8, segments_per_window=2, lanes=2, micro_batch_size=2, num_workers=0
    )
    if fail_at is not None:
        train = module.training_step
        module.training_step = lambda batch, batch_idx: 1 / 0 if batch_idx == fail_at else train(batch, batch_idx)
    guard = StepGuard(run)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=12,
        max_epochs=-1,
        log_every_n_steps=2,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=[TensorBoardLogger(run, name="", version="tensorboard"), ProgressLines(12)],
        callbacks=[guard, TrainMetrics(guard), MemoryMetrics(), Throughput(), ModelSize()],
        plugins=[DirectoryIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    capsys.readouterr()
    if fail_at is None:
        trainer.fit(module, data)
    else:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(module, data)
        trainer.logger.experiment.flush()
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    curves = {tag: {e.step: e.value for e in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    told = capsys.readouterr().out.splitlines()
    assert told.count(f"infini-train: model of {sum(p.numel() for p in module.parameters()):,} parameters") == 1
    printed = [line for line in told if line.startswith("step")]
    return printed, curves


def check(line: str, curves: dict) -> int:
    """A line of progress against the curves; its step."""
    found = LINE.fullmatch(line)
    assert found, line
    step, percent, loss, rate, *times = found.groups()
    at = int(step)
    assert float(percent) == pytest.approx(100 * at / 12, abs=0.05)
    assert loss == f"{curves['train/loss'][at]:.4f}"
    speeds = [s for s in curves["speed/tokens_per_second"] if s <= at]
    assert (rate is None) == (not speeds)
    if speeds:
        assert float(rate.replace(",", "")) == pytest.approx(
            curves["speed/tokens_per_second"][speeds[-1]], abs=0.51, rel=1e-6
        )
    assert (times[3] is None) == (not speeds or at == 12)
    if times[3] is not None:
        expected = (12 - at) * curves["speed/step_seconds"][speeds[-1]]
        assert seconds(*times[3:]) == pytest.approx(expected, abs=0.5)
    return at


def test_every_log_interval_where_it_is_long(tmp_path, dataset, capsys, monkeypatch):
    printed, curves = lines(tmp_path, dataset, capsys, monkeypatch, clock=10.0)
    validations = [line for line in printed if "validation" in line]
    assert validations == [
        f"step {step:>2}/12  validation loss {curves['val/loss'][step]:.4f}, "
        f"memory benefit {curves['val/memory_benefit'][step]:.4f}"
        for step in (6, 12)
    ]
    training = [line for line in printed if line not in validations]
    assert [check(line, curves) for line in training] == [1, 2, 4, 6, 8, 10, 12]
    elapsed = [seconds(*LINE.fullmatch(line).groups()[4:7]) for line in training]
    # The clock was asked at the start, once for the first line, and twice (is it due? now) for every other one.
    assert elapsed == [10, 30, 50, 70, 90, 110, 130]


def test_a_fast_run_prints_its_first_and_last_step(tmp_path, dataset, capsys, monkeypatch):
    printed, curves = lines(tmp_path, dataset, capsys, monkeypatch, clock=0.001)
    assert [check(line, curves) for line in printed if "validation" not in line] == [1, 12]
    assert printed.index(next(line for line in printed if "validation" in line)) == 1  # at once, not at the end


def test_at_most_one_line_in_ten_seconds(tmp_path, dataset, capsys, monkeypatch):
    printed, curves = lines(tmp_path, dataset, capsys, monkeypatch, clock=5.0)
    assert [check(line, curves) for line in printed if "validation" not in line] == [1, 4, 8, 12]


def test_a_run_that_fails_prints_the_last_step_it_did(tmp_path, dataset, capsys, monkeypatch):
    printed, curves = lines(tmp_path, dataset, capsys, monkeypatch, clock=0.001, fail_at=7)
    assert check(printed[-1], curves) == 7


def test_words_of_a_long_run(capsys, monkeypatch):
    monkeypatch.setattr(progress, "time", Clock(65.0))
    lines = ProgressLines(1000)
    for step in (120, 130):  # resumed at 119
        lines.log_metrics({"train/loss": 4.12344, "train/tokens": 1e6}, step=step)
        lines.log_metrics({"speed/tokens_per_second": 12755.4, "speed/step_seconds": 360.0}, step=step)
    lines.log_metrics({"val/loss": 4.41, "val/memory_benefit": 0.51, "val/segment_0": 5.0}, step=130)
    assert capsys.readouterr().out.splitlines() == [
        "step  120/1000  12.0%  loss 4.1234  elapsed 0:01:05",
        "step  120/1000  12.0%  loss 4.1234  12,755 tokens/s  elapsed 0:03:15  ends in 3 days, 16:00:00",
        "step  130/1000  13.0%  loss 4.1234  12,755 tokens/s  elapsed 0:05:25  ends in 3 days, 15:00:00",
        "step  130/1000  validation loss 4.4100, memory benefit 0.5100",
    ]


def test_bar_counts_micro_batches_of_the_whole_run():
    bar = progress.RunProgressBar()
    bar._trainer = Trainer(
        max_steps=12, accumulate_grad_batches=4, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    assert bar.total_train_batches == 48
