"""Every command of docs/tutorial.md runs, with fewer documents and steps, in the order of the page."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

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


def commands() -> list[list[str]]:
    """The words of each command in the page's blocks of shell."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def smaller(words: list[str]) -> list[str]:
    return [words[0], *(SMALLER.get(pair, pair[1]) for pair in pairwise(words))]


def test_the_page_has_commands():
    assert [words[:2] for words in commands()].count(["infini-train", "fit"]) == 3
    assert all(words[0] == "infini-train" for words in commands())
    assert set(SMALLER) <= {pair for words in commands() for pair in pairwise(words)}  # none of them is out of date


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    outputs = []
    for words in commands():
        command = [sys.executable, "-m", "infini_train", *smaller(words)[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout + done.stderr)
    assert "#SBATCH --gpus-per-node=2" in outputs[-1] and not (tmp_path / "runs" / "pairs-cluster").exists()
    page = (tmp_path / "report.html").read_text()
    assert "Passkeys recalled" in page
    for name in ("pairs/recall.png", "passkey/passkey.png"):
        assert (tmp_path / "runs" / name).stat().st_size > 1000
