"""A short soak (tests/helpers/soak.py): two ranks under faults end with the unbroken run's bits."""

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_short_soak():
    """One leg of three starts that are interrupted; `make soak` goes on for an hour."""
    command = [sys.executable, "-m", "tests.helpers.soak", "--minutes", "0", "--legs", "1", "--starts", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "step 24: the unbroken run's bits" in done.stdout
    assert sum(int(times) for times in re.findall(r"^\| .* \| (\d+) \|", done.stdout, re.MULTILINE)) >= 3
