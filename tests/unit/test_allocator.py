"""The allocator's settings, and which allocator it is."""

import os
import shutil
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
    """The system counts how many pages it hands out anew."""
    kept, default = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "default")
    )
    assert default > 1000  # pages, huge ones among them perhaps
    assert kept < default / 10


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="of glibc, and needs a compiler")
def test_another_allocator_is_recognised(tmp_path):
    """A library with the function that only jemalloc has, loaded as jemalloc would be."""
    library = tmp_path / "other.so"
    compile_it = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(compile_it, input="int mallctl(void) { return 0; }", check=True, text=True)
    code = "from infini_train.training.allocator import has_glibc_malloc; print(has_glibc_malloc())"
    for preloaded, expected in (("", "True\n"), (str(library), "False\n")):
        environment = {**os.environ, "LD_PRELOAD": preloaded}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        assert done.stdout == expected
