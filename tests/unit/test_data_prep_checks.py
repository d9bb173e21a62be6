"""Quick checks of many small things agree with those of one at a time."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.indexing import TokenCheck
from data_prep.item_files import ITEMS, ItemWriter, read_items

VOCABULARY, BOS, EOS = 100, 1, 2
DOCUMENT = st.lists(st.sampled_from([0, BOS, EOS, 50, VOCABULARY - 1, VOCABULARY]), max_size=6)


@given(
    st.lists(st.tuples(DOCUMENT, st.integers(0, 3)), min_size=1, max_size=12),
    st.sets(st.integers(0, 11)),
    st.sampled_from([np.uint16, np.uint32]),
    st.integers(0, 3),
)
def test_first_fault(
    documents: list[tuple[list[int], int]], whole: set[int], dtype: type[np.unsignedinteger], cut: int
) -> None:
    """Documents with anything between them, most of them whole, and a file that may end too early."""
    content, offsets, counts = b"", [], []
    for number, (tokens, gap) in enumerate(documents):
        if number not in whole:
            tokens = [BOS, *(token % VOCABULARY for token in tokens), EOS]
        content += b"\xff" * 2 * gap
        offsets.append(len(content))
        counts.append(len(tokens))
        content += np.array(tokens, dtype).tobytes()
    check = TokenCheck(io.BytesIO(content[: len(content) - cut]), dtype, VOCABULARY, BOS, EOS)
    faults = [check.fault(offset, count) for offset, count in zip(offsets, counts, strict=True)]
    first = next(((number, fault) for number, fault in enumerate(faults) if fault), None)
    assert check.first_fault(np.array(offsets), np.array(counts)) == first


@pytest.mark.parametrize("count", [0, 1, ITEMS, 2 * ITEMS + 3])
def test_items_of_a_file(tmp_path: Path, count: int) -> None:
    items = [[number, "caf\udce9", None] for number in range(count)]
    path = tmp_path / "items"
    with open(path, "wb") as f:
        writer = ItemWriter(f)
        for item in items:
            writer.add(item)
        writer.close()
    assert list(read_items(path, tmp_path)) == items
    content = path.read_bytes()
    assert max(len(json.loads(line) or []) for line in content.splitlines()) <= ITEMS
    for end in {*range(0, len(content), 997), len(content) - 2}:
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="truncated"):
            list(read_items(path, tmp_path))
