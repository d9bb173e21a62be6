"""Settings of glibc's allocator for training on a CPU, and whether it is in use at all."""

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # of <malloc.h>
LARGE = 1 << 20  # bytes: most tensors of a chunk are larger, and what is kept of it is smaller


def configure_malloc(chunked: bool = False) -> None:
    """Make this process and its children keep the memory that they free for later allocations.

    By default glibc returns each large block to the system, and gets it back as pages that must be zeroed one by one,
    in every operation of every step (docs/memory.md, Time). Where a window runs in chunks, that is nevertheless the
    better way: of each chunk small tensors are kept until backward, which would lie scattered among the large blocks
    that are freed. The next chunk's tensors fit into few of the gaps, and memory would grow with the number of chunks
    (docs/performance.md). If the C library is not glibc, this does nothing.

    Args:
        chunked: keep small blocks alone, and return those of at least 1 MiB to the system.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    options: tuple[tuple[int, int], ...]
    if chunked:
        # A threshold that is set stays, while glibc would raise its own to 32 MiB. Blocks above it are mapped only
        # where the end of the heap has no room for them, so the heap grows in small steps.
        options = ((MMAP_THRESHOLD, LARGE), (MMAP_MAX, 65536), (TOP_PAD, LARGE // 8))
    else:
        options = ((MMAP_MAX, 0), (TOP_PAD, 1 << 28))
    for option, value in ((TRIM_THRESHOLD, -1), *options):
        mallopt(option, value)


def has_glibc_malloc() -> bool:
    """Return whether this process has glibc's malloc, and not jemalloc, TCMalloc or mimalloc loaded before it."""
    loaded = ctypes.CDLL(None)
    others = ("mallctl", "tc_version", "mi_version")
    return hasattr(loaded, "gnu_get_libc_version") and not any(hasattr(loaded, name) for name in others)
