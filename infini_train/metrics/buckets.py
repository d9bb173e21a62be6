"""Segments of a document counted by powers of two: 0, 1, 2-3, 4-7, ..."""

BUCKETS = 32


def bucket_of(segment: int) -> int:
    """Bucket of the segment with this number in its document, counted from 0."""
    return segment.bit_length()


def bucket_name(bucket: int) -> str:
    low, high = (0, 0) if bucket == 0 else (2 ** (bucket - 1), 2**bucket - 1)
    return f"{low}" if low == high else f"{low}-{high}"
