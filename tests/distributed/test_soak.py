"""A short soak (tests/helpers/soak.py): two ranks under faults end with the unbroken run's bits."""

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    """One leg of three starts that are interrupted; `make soak` goes on for an hour."""
    command = [sys.executable, "-m", "tests.helpers.soak", "--minutes", "0", "--legs", "1", "--starts", "3"]
    log = tmp_path / "log"
    with log.open("w") as file:  # a pipe would be held open by what killed runs leave behind
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    printed = log.read_text()
    assert code == 0, printed
    assert "step 24: the unbroken run's bits" in printed
    assert sum(int(times) for times in re.findall(r"^\| .* \| (\d+) \|", printed, re.MULTILINE)) >= 3
