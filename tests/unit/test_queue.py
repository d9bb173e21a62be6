"""The queue of documents against a plain one that chooses anew for every document, from lists of what it began."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infini_train.data.queue import DocumentQueue, QueuedDataset, QueuePosition
from tests.helpers.lane_reference import queue_reference

part = st.tuples(
    st.lists(st.integers(2, 30), min_size=1, max_size=6),
    st.sampled_from([0.25, 1.0, 1.0, 3.0]),
    st.sampled_from([None, None, 1, 3]),
)
mixtures = st.lists(part, min_size=1, max_size=4)
seeds = st.integers(0, 2**63 - 1)


def queue(parts, seed, positions=None) -> DocumentQueue:
    tokens_D = np.array([n for lengths, *_ in parts for n in lengths])
    datasets = [QueuedDataset(len(lengths), weight, epochs) for lengths, weight, epochs in parts]
    return DocumentQueue(tokens_D, datasets, seed, positions)


@given(mixtures, seeds, st.integers(0, 40))
def test_same_as_reference_and_from_anywhere(parts, seed, at):
    rng = np.random.default_rng(seed)
    asked = [rng.integers(0, most, size=(80, len(parts))).tolist() for most in (500, 9)]
    asked = list(zip(*asked, strict=True))
    first = np.cumsum([0, *(len(lengths) for lengths, *_ in parts)])
    asking = iter(asked)
    expected = [int(first[n]) + doc for n, doc in islice(queue_reference(parts, seed, lambda: next(asking)), 80)]
    ours = queue(parts, seed)
    for n, doc in enumerate(expected):
        if n == at:
            dealt = ours.dealt
            ours = queue(parts, seed, [QueuePosition(*position) for position in ours.positions])
            assert ours.dealt == dealt or not ours.mixed
        assert ours.next(*asked[n]) == doc
    if len(expected) < 80:
        with pytest.raises(ValueError, match=r"data\.train: found [\d,]+ tokens in all epochs"):
            ours.next(*asked[-1])


def test_every_document_once_an_epoch():
    parts = [([5, 9, 4], 1.0, 2), ([7, 3, 8, 8], 2.0, 1)]
    ours = queue(parts, 3)
    handed = [ours.next([0, 0], [0, 0]) for _ in range(3 * 2 + 4)]
    assert sorted(handed) == sorted([0, 1, 2] * 2 + [3, 4, 5, 6])
    mine = [doc for doc in handed if doc < 3]
    assert sorted(mine[:3]) == sorted(mine[3:]) == [0, 1, 2]
