"""Freed blocks stay with the process: the system counts how many pages it hands out anew."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from infini_train.training.allocator import keep_freed_blocks
if sys.argv[1] == "keep":
    keep_freed_blocks()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    torch.ones(16 << 20).add_(1)  # 64 MiB
for _ in range(10):
    step()  # until the heap has grown
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_large_blocks_are_kept():
    kept, default = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "default")
    )
    assert default > 1000  # pages, huge ones among them perhaps
    assert kept < default / 10
