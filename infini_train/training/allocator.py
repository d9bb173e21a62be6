"""What glibc's allocator does with large blocks, for training on a CPU."""

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of <malloc.h>


def keep_freed_blocks() -> None:
    """Let this process and its children keep large blocks that they free, for the next allocation.

    By default each is given back to the system and comes back as pages to be zeroed one by one, in every operation
    of every step (docs/memory.md, Time). Nothing is done where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, 1 << 28)):
        mallopt(option, value)
