"""The allocator's settings, and which allocator it is."""

import os
import shutil
import subprocess
import sys
from functools import partial

import pytest

FAULTS = """
import resource, sys
import torch
from infini_train.training.allocator import configure_malloc
if sys.argv[1] == "keep":
    configure_malloc()
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


CHUNKS = """
import random, sys
import torch
from benchmarks.timing import growth_mib
from infini_train.training.allocator import configure_malloc
configure_malloc(chunked=sys.argv[1] == "chunked")
draw, kept = random.Random(0), []
def chunks():
    for _ in range(100):
        large = []
        for _ in range(8):
            large.append(torch.ones(draw.randrange(1 << 20, 1 << 22)))  # 4 to 16 MiB
            kept.append(torch.ones(1 << 13))  # 32 KiB, of which 25 MiB are kept in the end
print(growth_mib(chunks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_small_blocks_that_are_kept_do_not_hold_large_ones():
    """At most 8 large tensors are alive, 128 MiB, beside the small ones of all chunks."""
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    whole, chunked = (float(run([sys.executable, "-c", CHUNKS, how]).stdout) for how in ("whole", "chunked"))
    assert 25 < chunked < 160
    assert whole > 1.5 * chunked


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
