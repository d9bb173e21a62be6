"""Loggers beside tensorboard go on in one run of theirs when a run of ours resumes."""

import csv
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from jsonargparse import Namespace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from infini_train.inspection.events import history
from infini_train.training.loggers import RunBoard, continued
from tests.helpers.datasets import make_dataset
from tests.helpers.results import LENGTHS
from tests.helpers.runs import fit


def losses(logs: Path) -> list[tuple[int, float]]:
    """Steps and losses of the only file of a CSVLogger, in its order."""
    (file,) = logs.rglob("metrics.csv")
    with file.open(newline="") as rows:
        return [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(rows) if row["train/loss"]]


@pytest.mark.parametrize("later", [100.0, 1.0, 0.3, 0.0, -4000.0])
def test_a_clock_that_is_set_back_does_not_hide_what_a_resumed_run_logs(tmp_path, monkeypatch, later):
    """As TensorBoard and the report read it."""
    start = time.time()
    numbers = iter((3, 2, 1))  # these order the names of one second
    monkeypatch.setattr(event_file_writer, "_global_uid", SimpleNamespace(get=lambda: next(numbers)))
    for now, begin, end in ((start, 0, 12), (start + later, 9, 14), (start + later / 2, 11, 16)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        board = RunBoard(tmp_path, name="", version="tensorboard", purge_step=begin + 1)
        for step in range(begin + 1, end + 1):
            board.log_metrics({"train/loss": 100 * begin + step}, step)
        board.finalize("success")
        assert event_file_writer.time is time
    expected = {step: 100 * (0 if step <= 9 else 9 if step <= 11 else 11) + step for step in range(1, 17)}
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert {event.step: event.value for event in read.Scalars("train/loss")} == expected
    assert {point.step: point.value for point in history(tmp_path / "tensorboard").points["train/loss"]} == expected


def test_a_full_disk_is_told_as_such(tmp_path, capsys):
    """TensorBoard writes in a thread, whose error Lightning takes for a value that cannot be logged."""
    board = RunBoard(tmp_path, name="", version="tensorboard")
    board.log_metrics({"train/loss": 1.0}, 1)
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    file.unlink()
    file.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/events.out.tfevents"):  # noqa: PT012
        for step in range(2, 100):
            board.log_metrics({"train/loss": 1.0}, step)
            time.sleep(0.05)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="tried to log"):
        RunBoard(tmp_path / "other", name="", version="tensorboard").log_metrics({"train/loss": "none"}, 1)


def test_a_killed_run_goes_on_in_its_csv_file(tmp_path):
    make_dataset(tmp_path / "shards", LENGTHS)
    options = {"logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": ""}}], "max_steps": 9}

    def logged(name: str, **how) -> tuple[int, int]:
        options["logger"][0]["init_args"]["save_dir"] = str(tmp_path / f"{name}-logs")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": options}))
        words = ("--config", str(tmp_path / "config.yaml"), "--trainer.max_steps", "9")
        found = fit(tmp_path / name, tmp_path / "shards", *words, **how)
        return found.code, found.instants

    code, instants = logged("whole")
    assert code == 0
    assert logged("broken", die_at=instants * 3 // 5)[0] == -signal.SIGKILL
    assert logged("broken")[0] == 0
    assert [step for step, _ in losses(tmp_path / "broken-logs")] == list(range(1, 10))
    assert losses(tmp_path / "broken-logs") == losses(tmp_path / "whole-logs")
    (hparams,) = (tmp_path / "broken-logs").rglob("hparams.yaml")
    assert yaml.safe_load(hparams.read_text())["model"]["optimizer"]["warmup_steps"] == 5
    kept = yaml.safe_load((tmp_path / "broken" / "config.yaml").read_text())["trainer"]["logger"]
    assert kept[0]["init_args"]["version"] is None  # another run with this configuration starts a log of its own


@pytest.mark.parametrize(
    ("kind", "given", "stored", "expected"),
    [
        ("WandbLogger", {"version": None, "id": None}, "abc", {"version": "abc", "id": None}),
        ("WandbLogger", {"version": None, "id": "mine"}, "abc", {"version": None, "id": "mine"}),
        ("MLFlowLogger", {"run_id": None, "run_name": "x"}, "f00", {"run_id": "f00", "run_name": "x"}),
        ("CSVLogger", {"version": None}, 0, {"version": 0}),
        ("CSVLogger", {"version": 3}, 0, {"version": 3}),
        ("CSVLogger", {"version": "a/b"}, "a/b", {"version": "a/b"}),
    ],
)
def test_names_are_given_to_loggers_that_had_them(tmp_path, kind, given, stored, expected):
    option = Namespace(class_path=f"lightning.pytorch.loggers.{kind}", init_args=Namespace(**given))
    assert continued([option], tmp_path)[0].init_args == Namespace(**given)
    (tmp_path / "loggers.json").write_text(json.dumps([[kind, stored]]))
    for logger in (continued([option], tmp_path)[0], continued(option, tmp_path)):
        assert logger.init_args == Namespace(**expected)
    other = Namespace(class_path="lightning.pytorch.loggers.CometLogger", init_args=Namespace(experiment_key=None))
    assert continued(other, tmp_path).init_args.experiment_key is None
    assert continued(True, tmp_path) is True


@pytest.mark.parametrize("content", ["", '[["CSVLogger", 0]', "{}", "[1]", '[["CSVLogger"]]'])
def test_damaged_names_are_refused(tmp_path, content):
    (tmp_path / "loggers.json").write_text(content)
    with pytest.raises(ValueError, match=r"loggers\.json: damaged: found"):
        continued(Namespace(class_path="CSVLogger", init_args=Namespace(version=None)), tmp_path)
