"""benchmarks/memory_report.py but for the trainings: the tables of all parts, failures, CPU time."""

import json
from pathlib import Path

import pytest

from benchmarks import memory_report


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_parts_it_is_all_of_them(here, monkeypatch, capsys):
    recalled = {"accuracy": {kind: [{"segment": "8-15", "on": 0.75}, {"segment": "512-1023", "on": 0.5}]
                             for kind in ("memory_only", "latest")}}  # fmt: skip
    passkeys = {"cells": [{"tokens": n, "right": right} for n in memory_report.LENGTHS for right in (1.0, 0.5)]}
    ran = []

    def run(*words, log=None, part=None):
        ran.append(str(words[0]))
        if part in ("books", "stability"):
            report = Path("runs/memory-report/books/stdlib" if part == "books" else "runs/stability") / "report.json"
            report.parent.mkdir(parents=True)
            report.write_text(json.dumps({"of": part}))
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"tables of {part}")
            with memory_report.CPU.open("a") as file:
                file.write(json.dumps({"part": part, "minutes": 1.5}) + "\n")

    monkeypatch.setattr(memory_report, "run", run)
    monkeypatch.setattr(memory_report, "measure", lambda name, *arm: passkeys if name == "passkey" else recalled)
    memory_report.main([])
    assert sorted(ran) == ["benchmarks.books", "benchmarks.stability", *["data_prep"] * 3]
    *_, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert figures["recall"]["selective-delta"] == {"at 16 segments": [0.75] * 3, "at 1,024": [0.5] * 3}
    assert figures["overwrite"]["paper-linear"] == {"at 16 segments": [0.75], "at 1,024": [0.5]}
    assert figures["passkey"]["paper-delta"] == {"2,048 tokens": [0.75], "131,072 tokens": [0.75]}
    assert figures["books"] == {"of": "books"} and figures["stability"] == {"of": "stability"}
    assert figures["cpu_minutes"] == {"books": 1.5, "stability": 1.5}


def test_a_failure_is_shown_and_its_time_noted(here):
    log = memory_report.ROOT / "x.log"
    with pytest.raises(SystemExit, match="exit code 1; the end of") as error:
        memory_report.run("timeit", "-n", "1", "-r", "1", "-s", "sum(range(10**7))", "1 / 0", log=log, part="x")
    assert "ZeroDivisionError" in str(error.value)
    (noted,) = map(json.loads, memory_report.CPU.read_text().splitlines())
    assert noted["part"] == "x" and 0 < noted["minutes"] < 1
