"""A short soak (tests/helpers/soak.py): two ranks under faults end with the unbroken run's bits."""

import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest


def marked(mark: str) -> list[str]:
    """The processes with this `name=value` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (process / "environ").read_text(errors="replace").split("\0"):
                found.append(f"{process.name}: {(process / 'cmdline').read_text()}")
    return found


# The first has a full disk and a kill.
@pytest.mark.parametrize(("seed", "starts"), [(5, 2), pytest.param(0, 3, marks=pytest.mark.slow)])
def test_a_short_soak(tmp_path, seed, starts):
    """One leg of a few starts that are interrupted; `make soak` goes on for an hour. No process is left behind."""
    command = [sys.executable, "-m", "tests.helpers.soak", "--minutes", "0", "--legs", "1"]
    command += ["--seed", str(seed), "--starts", str(starts)]
    environment = os.environ | {"TEST_OF_SOAK": str(tmp_path)}  # which all of its processes inherit
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 24: the unbroken run's bits" in done.stdout
    assert sum(int(times) for times in re.findall(r"^\| .* \| (\d+) \|", done.stdout, re.MULTILINE)) >= starts
    deadline = time.monotonic() + 20
    while left := marked(f"TEST_OF_SOAK={tmp_path}"):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
