"""Settings of glibc's allocator that speed up training on a CPU."""

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of <malloc.h>


def keep_freed_blocks() -> None:
    """Make this process and its children keep large blocks that they free, for later allocations.

    By default glibc returns each of them to the system, and gets them back as pages that must be zeroed one by one,
    in every operation of every step (docs/memory.md, Time). If the C library is not glibc, this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, 1 << 28)):
        mallopt(option, value)
