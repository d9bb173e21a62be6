"""README and docs: tables are those of docs/results, links lead somewhere, the README is short."""

import json
import re
import sys
from pathlib import Path

import pytest
from rich.table import Table

from benchmarks import render, results

ROOT = render.ROOT
FILES = [*render.markdown_files(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NAMES = [str(file.relative_to(ROOT)) for file in FILES]
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives to a file's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", file.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_tables_are_rendered_from_results(file):
    assert render.rendered(file.read_text()) == file.read_text(), "found another table, expected that of `make docs`"


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_links_lead_somewhere(file):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", file.read_text())):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


TO_BE_MADE = {"infini_train/model/gated_delta.py", "slurm/environment.sh"}  # by the reader


@pytest.mark.parametrize("file", [file for file in FILES if file.name != "CHANGELOG.md"])
def test_files_that_are_named_exist(file):
    """Paths in backquotes, from the root or from the package on."""
    rooms = "infini_train|data_prep|tests|benchmarks|launch|slurm|configs|findings|model|training|data|hf|evaluation"
    named = re.findall(rf"`((?:{rooms})/[\w/.-]+\.(?:py|sh|yaml|c))`", file.read_text())
    missing = {name for name in named if not any((at / name).exists() for at in (ROOT, ROOT / "infini_train"))}
    assert not missing - TO_BE_MADE


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8192


def test_results_say_where_they_come_from():
    for file in render.RESULTS.glob("*.json"):
        found = json.loads(file.read_text())
        assert {"command", "version", "commit", "date", "machine", "summary", "tables", "figures"} <= set(found)
        assert {"cpu", "cores", "GFLOP/s"} <= set(found["machine"])
        for table in found["tables"].values():
            assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])


def test_a_result_is_written_and_rendered(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "machine", lambda: {"cpu": "a cpu", "cores": 2, "GFLOP/s": 150})
    monkeypatch.setattr(sys, "argv", ["benchmarks/lanes.py", "--results", "x", "--data", "/home/me", "--dim", "64"])
    table = Table("tokens", "time")
    table.add_row("2,048", "1.5\n± 0.1")
    results.report("lanes", {"": table}, {"time": 1.5}, {"time of a step": "1.5 s"}, None)
    assert not list(tmp_path.iterdir())  # a trial run
    results.report("lanes", {"": table}, {"time": 1.5}, {"time of a step": "1.5 s"}, tmp_path)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"time": 1.5}
    text = "before\n<!-- results: lanes -->\nold\n<!-- end -->\n<!-- summary: lanes -->\n<!-- end -->\nafter\n"
    made = render.rendered(text)
    assert "old" not in made and made.startswith("before\n") and made.endswith("<!-- end -->\nafter\n")
    assert "| tokens | time |\n| --- | --- |\n| 2,048 | 1.5 ± 0.1 |" in made
    assert "`python -m benchmarks.lanes --data BOOKS --dim 64`" in made and "a cpu, 2 cores, 150 GFLOP/s" in made
    assert "| time of a step | 1.5 s | `benchmarks.lanes --data BOOKS --dim 64` |" in made
    assert render.rendered(made) == made
