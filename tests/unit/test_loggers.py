"""Loggers beside tensorboard go on in one run of theirs when a run of ours resumes."""

import csv
import json
import signal
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from infini_train.training.loggers import continued
from tests.helpers.datasets import make_dataset
from tests.helpers.results import LENGTHS
from tests.helpers.runs import fit


def losses(logs: Path) -> list[tuple[int, float]]:
    """Steps and losses of the only file of a CSVLogger, in its order."""
    (file,) = logs.rglob("metrics.csv")
    with file.open(newline="") as rows:
        return [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(rows) if row["train/loss"]]


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
