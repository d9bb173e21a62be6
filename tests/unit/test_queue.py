"""The queue of documents against a plain one that counts all tokens anew for every document it hands out."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infini_train.data.queue import DocumentQueue, Place, Share

part = st.tuples(
    st.lists(st.integers(2, 30), min_size=1, max_size=6),
    st.sampled_from([0.25, 1.0, 1.0, 3.0]),
    st.sampled_from([None, None, 1, 3]),
)
mixtures = st.lists(part, min_size=1, max_size=4)
seeds = st.integers(0, 2**63 - 1)


def reference(parts, seed):
    """Yields (dataset, document) until no dataset has epochs left."""
    begun: list[list[int]] = [[] for _ in parts]
    while True:
        candidates = []
        for number, (lengths, weight, epochs) in enumerate(parts):
            if epochs is None or len(begun[number]) < epochs * len(lengths):
                candidates.append((sum(lengths[doc] for doc in begun[number]) / weight, number))
        if not candidates:
            return
        _, number = min(candidates)
        lengths = parts[number][0]
        epoch, position = divmod(len(begun[number]), len(lengths))
        bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=number * 2**192)
        keys = bits.random_raw(len(lengths)).tolist()
        doc = sorted(range(len(lengths)), key=keys.__getitem__)[position]
        begun[number].append(doc)
        yield number, doc


def queue(parts, seed, places=None) -> DocumentQueue:
    tokens_D = np.array([n for lengths, *_ in parts for n in lengths])
    shares = [Share(len(lengths), weight, epochs) for lengths, weight, epochs in parts]
    return DocumentQueue(tokens_D, shares, seed, places)


@given(mixtures, seeds, st.integers(0, 40))
def test_same_as_reference_and_from_anywhere(parts, seed, at):
    first = np.cumsum([0, *(len(lengths) for lengths, *_ in parts)])
    expected = [int(first[number]) + doc for number, doc in islice(reference(parts, seed), 80)]
    ours = queue(parts, seed)
    for n, doc in enumerate(expected):
        if n == at:
            ours = queue(parts, seed, [Place(*place) for place in ours.places])
        assert ours.next() == doc
    if len(expected) < 80:
        with pytest.raises(ValueError, match=r"train: found [\d,]+ tokens in all epochs"):
            ours.next()


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4), seeds)
def test_shares_stay_within_a_document_of_the_weights(weights, seed):
    rng = np.random.default_rng(seed)
    parts = [(rng.integers(2, 50, size=20).tolist(), weight, None) for weight in weights]
    ours = queue(parts, seed)
    for _ in range(300):
        ours.next()
        dealt = np.array(ours.dealt) / weights  # of each dataset, over its weight: equal but for one document
        assert dealt.max() - dealt.min() <= 50 / min(weights)


def test_every_document_once_an_epoch():
    parts = [([5, 9, 4], 1.0, 2), ([7, 3, 8, 8], 2.0, 1)]
    ours = queue(parts, 3)
    handed = [ours.next() for _ in range(3 * 2 + 4)]
    assert sorted(handed) == sorted([0, 1, 2] * 2 + [3, 4, 5, 6])
    mine = [doc for doc in handed if doc < 3]
    assert sorted(mine[:3]) == sorted(mine[3:]) == [0, 1, 2]
