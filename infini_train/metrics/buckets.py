"""Buckets of a segment's number in its document, by powers of two: 0, 1, 2-3, 4-7, ..."""

BUCKETS = 32


def bucket_of(segment: int) -> int:
    """Return the bucket of a segment, given its number in its document, from 0."""
    return segment.bit_length()


def bucket_name(bucket: int) -> str:
    """Return the range of segment numbers in a bucket, such as "4-7"."""
    low, high = (0, 0) if bucket == 0 else (2 ** (bucket - 1), 2**bucket - 1)
    return f"{low}" if low == high else f"{low}-{high}"
