"""benchmarks/memory_report.py but for the trainings: the tables of all parts, failures, CPU time."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import memory_report, stability
from benchmarks.books import REPORTED
from benchmarks.commands import CPU, run
from infini_train.inspection.events import Curves, Point


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_parts_it_is_all_of_them(here, monkeypatch, capsys):
    recalled = {"accuracy": {kind: [{"segment": "8-15", "on": 0.75}, {"segment": "512-1023", "on": 0.5}]
                             for kind in ("memory_only", "latest")}}  # fmt: skip
    passkeys = {"cells": [{"tokens": n, "right": right} for n in memory_report.LENGTHS for right in (1.0, 0.5)]}
    ran = []

    def fake(*words, log=None, part=None):
        command = " ".join(map(str, words))
        ran.append(command)
        if command == "benchmarks.books --root runs/memory-report/books":  # compares what the arms have left
            assert [line for line in ran if "--arms " in line] == [f"{command} --arms {arm}" for arm in REPORTED]
            report = Path("runs/memory-report/books/stdlib/report.json")
            report.parent.mkdir(parents=True)
            report.write_text(json.dumps({"of": "books"}))
        if command == "benchmarks.stability":
            Path("runs/stability").mkdir(parents=True)
            Path("runs/stability/report.json").write_text(json.dumps({"of": "stability"}))
            log.write_text("tables of stability")
        if part:
            CPU.parent.mkdir(parents=True, exist_ok=True)
            with CPU.open("a") as file:
                file.write(json.dumps({"part": part, "minutes": 1.5}) + "\n")

    monkeypatch.setattr(memory_report, "run", fake)
    monkeypatch.setattr(memory_report, "measure", lambda name, *arm: passkeys if name == "passkey" else recalled)
    memory_report.main([])
    assert sum(command.startswith("data_prep synth") for command in ran) == 3
    shown = capsys.readouterr().out
    assert "tables of stability" in shown
    *_, last = shown.splitlines()
    figures = json.loads(last)
    assert figures["recall"]["selective-delta"] == {"at 16 segments": [0.75] * 3, "at 1,024": [0.5] * 3}
    assert figures["overwrite"]["paper-linear"] == {"at 16 segments": [0.75], "at 1,024": [0.5]}
    assert figures["passkey"]["paper-delta"] == {"2,048 tokens": [0.75], "131,072 tokens": [0.75]}
    assert figures["books"] == {"of": "books"} and figures["stability"] == {"of": "stability"}
    assert figures["cpu_minutes"] == {"books": 1.5 * (1 + len(REPORTED)), "stability": 1.5}


def test_a_failure_is_shown_and_its_time_noted(here):
    log = memory_report.ROOT / "x.log"
    with pytest.raises(SystemExit, match="exit code 1; the end of") as error:
        run("timeit", "-n", "1", "-r", "1", "-s", "sum(range(10**7))", "1 / 0", log=log, part="x")
    assert "ZeroDivisionError" in str(error.value)
    (noted,) = map(json.loads, CPU.read_text().splitlines())
    assert noted["part"] == "x" and 0 < noted["minutes"] < 1


def test_a_training_that_diverges_is_a_result(here, monkeypatch):
    """`fit` stops at the first step that is not finite and leaves its batch; any other failure is one."""
    directory = stability.ROOT / "paper-delta"

    def fake(*words):
        if words[0] == "infini_train":
            directory.mkdir(parents=True)
            if diverges:
                (directory / "nonfinite-step-00000007-rank-00000.pt").touch()
            raise SystemExit("exit code 1")

    curves = {tag: [Point(7, 0.0, 2.0), Point(6, 0.0, 3.0)] for tag in stability.LOGGED.values()}
    monkeypatch.setattr(stability, "run", fake)
    monkeypatch.setattr(stability, "newest", lambda *_: Curves(curves))
    diverges = True
    found = stability.train("paper-delta", minutes=1)
    assert (found["first_non_finite_step"], found["steps"]) == (7, 7)
    assert (found["largest_loss"], found["last_loss"]) == (3.0, 2.0)
    shutil.rmtree(directory)
    diverges = False
    with pytest.raises(SystemExit, match="exit code 1"):
        stability.train("paper-delta", minutes=1)
