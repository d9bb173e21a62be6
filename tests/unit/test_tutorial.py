"""The notebook of docs/tutorial.md is that of the page, and runs, with fewer documents and steps."""

import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.notebook import NOTEBOOK, PAGE, RUN

ROOT = Path(__file__).resolve().parents[2]
# What makes the commands of the tutorial short: a word by the word before it and itself. All others stay.
SMALLER = {
    ("--documents", "2000"): "150",
    ("--documents", "8000"): "40",
    ("--trainer.max_steps", "300"): "4",
    ("--trainer.max_steps", "2400"): "2",
    ("--trainer.val_check_interval", "50"): "2",
    ("--trainer.log_every_n_steps", "10"): "1",
    ("--model.write_cost_from", "1200"): "1",
    ("--times", "64"): "2",
    ("--times", "16"): "2",
    ("--lengths", "2048"): "256",
    ("2048", "32768"): "512",
    ("--samples", "4"): "1",
}


def commands(block: str) -> list[list[str]]:
    """The words of each command in a block of shell."""
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def smaller(words: list[str]) -> list[str]:
    return [words[0], *(SMALLER.get(pair, pair[1]) for pair in pairwise(words))]


def test_the_page_has_commands():
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    found = commands("".join(blocks))
    assert [words[:2] for words in found].count(["infini-train", "fit"]) == 3
    assert all(words[0] == "infini-train" for words in found)
    assert set(SMALLER) <= {pair for words in found for pair in pairwise(words)}  # none of them is out of date


def test_the_notebook_put_together_is_the_page():
    parts = []
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source.startswith(RUN):
            outputs = ["".join(output["text"]) for output in cell["outputs"]]
            blocks = [f"```sh\n{source.removeprefix(RUN)}\n```", *(f"```\n{output}\n```" for output in outputs)]
            parts.append("\n".join(blocks))
    page = "\n\n".join(parts) + "\n"
    assert page == PAGE.read_text(), "found another notebook, expected that of `make docs`"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs(tmp_path):
    """Every command ends with exit code 0, since a cell whose command fails raises CellExecutionError."""
    import nbformat
    from nbclient import NotebookClient

    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    notebook = nbformat.read(shutil.copy(NOTEBOOK, tmp_path / "docs"), as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.source.startswith(RUN):
            small = [shlex.join(smaller(words)) for words in commands(cell.source.removeprefix(RUN))]
            cell.source = RUN + "\n".join(small)
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells]
    assert "#SBATCH --gpus-per-node=2" in printed[-2] and not (tmp_path / "runs" / "pairs-cluster").exists()
    assert "Passkeys recalled" in (tmp_path / "report.html").read_text()
    pictures = [cell.outputs[0].data for cell in notebook.cells if cell.source.startswith("Image(")]
    assert len(pictures) == 2 and all(len(picture["image/png"]) > 1000 for picture in pictures)
