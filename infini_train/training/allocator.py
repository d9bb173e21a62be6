"""Settings of glibc's allocator that speed up training on a CPU, and whether it is in use at all."""

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


def has_glibc_malloc() -> bool:
    """Return whether this process has glibc's malloc, and not jemalloc, TCMalloc or mimalloc loaded before it.

    What checkpointing keeps of each chunk lies between the large tensors that are freed. glibc puts large and small
    blocks side by side, so the next chunk's tensors often fit into none of the gaps, and memory grows with the number
    of chunks. The others keep small blocks apart.
    """
    loaded = ctypes.CDLL(None)
    others = ("mallctl", "tc_version", "mi_version")
    return hasattr(loaded, "gnu_get_libc_version") and not any(hasattr(loaded, name) for name in others)
