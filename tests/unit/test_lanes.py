"""The lane scheduler against a plain reference that lays token after token into every lane."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.data.lanes import Cursor, LaneScheduler
from infini_train.data.queue import epoch_order
from tests.helpers.lane_reference import reference, tokens_of

lengths = st.lists(st.integers(2, 30), min_size=1, max_size=12)
few = st.integers(1, 8)
windows = st.integers(1, 24)
seeds = st.integers(0, 2**63 - 1)


def scheduler(tokens_D, lanes, window, seed, cursor=None):
    return LaneScheduler(np.array(tokens_D), lanes=lanes, window=window, seed=seed, fingerprint="f", cursor=cursor)


def steps_for_epochs(tokens_D, lanes, window, epochs):
    """Enough steps to pass that many epoch boundaries."""
    return -(-sum(tokens_D) * (epochs + 1) // (lanes * window)) + 1


@given(lengths, few, windows, seeds)
def test_same_as_reference_over_three_epoch_boundaries(tokens_D, lanes, window, seed):
    ours = scheduler(tokens_D, lanes, window, seed)
    steps = steps_for_epochs(tokens_D, lanes, window, 3)
    for expected in islice(reference(tokens_D, lanes, window, seed), steps):
        step = ours.next_step()
        assert tokens_of(step, lanes) == expected
        assert step.labels == sum(i + 1 < tokens_D[doc] for row in expected for doc, i in row)
    assert ours.queue.positions[0].epoch >= 3


@given(lengths, few, windows, seeds)
def test_each_document_once_an_epoch(tokens_D, lanes, window, seed):
    """Documents in the order in which they begin, over all lanes: each block of D is every document once."""
    ours = scheduler(tokens_D, lanes, window, seed)
    begun = Counter()
    for _ in range(steps_for_epochs(tokens_D, lanes, window, 3)):
        begun.update(doc for row in tokens_of(ours.next_step(), lanes) for doc, i in row if i == 0)
        # lanes begin documents out of queue order within a step, so count what the queue has handed out: begun
        # documents plus those that a lane holds but has not begun
        held = Counter(ours.doc_L[ours.offset_L == 0].tolist())
        total = begun + held
        ((epoch, position),) = ours.queue.positions
        assert sum(total.values()) == epoch * len(tokens_D) + position
        assert all(epoch <= total[doc] <= epoch + 1 for doc in range(len(tokens_D)))


@given(lengths, few, windows, seeds, st.integers(0, 30))
def test_resume_anywhere(tokens_D, lanes, window, seed, at):
    ours = scheduler(tokens_D, lanes, window, seed)
    for _ in range(at):
        ours.next_step()
    cursor = ours.cursor
    text = json.dumps(cursor.to_dict())
    restored = Cursor.from_dict(json.loads(text))
    assert restored == cursor
    assert restored.step == at
    resumed = scheduler(tokens_D, lanes, window, seed, restored)
    for expected in islice(reference(tokens_D, lanes, window, seed), at, at + 20):
        assert tokens_of(resumed.next_step(), lanes) == expected
        ours.next_step()
    assert resumed.cursor == ours.cursor != cursor
    assert json.dumps(cursor.to_dict()) == text  # moving on left the old cursor alone


def test_epochs_are_different_permutations():
    orders = {(seed, epoch): epoch_order(50, seed, epoch).tolist() for seed in (0, 1, 2**62) for epoch in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == len(orders)


def test_order_never_changes():
    """A changed order would silently break the resume of every older run."""
    assert epoch_order(10, seed=7, epoch=3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def test_cursor_is_small():
    ours = scheduler([100_000] * 2_000, 1_024, 4_096, 0)
    assert (ours.doc_L.nbytes + ours.offset_L.nbytes) / ours.cursor.lanes < 20


@settings(max_examples=20)
@given(
    st.fixed_dictionaries(
        {}, optional={"window": st.just(7), "seed": st.just(5), "lanes": st.just(2), "fingerprint": st.just("g")}
    )
)
def test_refuses_the_cursor_of_another_run(changes):
    settings_ = {"window": 8, "seed": 3, "lanes": 4, "fingerprint": "f"}
    cursor = LaneScheduler(np.array([9, 10, 11]), **settings_).cursor
    if not changes:
        LaneScheduler(np.array([9, 10, 11]), **settings_, cursor=cursor)
        return
    with pytest.raises(ValueError, match="cursor") as e:
        LaneScheduler(np.array([9, 10, 11]), **{**settings_, **changes}, cursor=cursor)
    for name, value in changes.items():
        assert f"cursor.{name}: found {settings_[name]}, expected {value}" in str(e.value)
    assert len(str(e.value).splitlines()) == len(changes) + 2  # what does not fit, and what to do


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": "0:3 3:0"}, "cursor.lanes: found 3:0 in lane 1, expected one of 3 documents"),
        ({"lanes": "0:3 1:10"}, "cursor.lanes: found 1:10 in lane 1"),
        ({"lanes": "0:3 1:-1"}, "cursor.lanes: found 1:-1 in lane 1"),
        ({"lanes": "0:3 1"}, "cursor.lanes: found '0:3 1'"),
        ({"lanes": "0:3 1:x"}, "cursor.lanes: found '0:3 1:x'"),
        ({"lanes": [1, 2]}, r"cursor.lanes: found \[1, 2\], expected str"),
        ({"step": None}, "cursor.step: found None, expected int"),
        ({"step": -1}, "cursor.step: found -1, expected at least 0"),
        ({"queue": 1.5}, "cursor.queue: found 1.5, expected str"),
        ({"queue": "0:1:2"}, "cursor.queue: found '0:1:2', expected `number:number"),
        ({"queue": "-1:2"}, "cursor.queue: found '-1:2', expected `epoch:position` of each of 1 datasets"),
        ({"queue": "0:4"}, "cursor.queue: found '0:4', expected .* at most 3 documents"),
        ({"queue": "0:1 0:1"}, "cursor.queue: found '0:1 0:1', expected `epoch:position` of each of 1 datasets"),
    ],
)
def test_refuses_a_damaged_cursor(change, message):
    good = scheduler([9, 10, 11], 2, 8, 3).cursor.to_dict()
    with pytest.raises(ValueError, match=message):
        scheduler([9, 10, 11], 2, 8, 3, Cursor.from_dict({**good, **change}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1, 4, 0), "found no documents"),
        (([5, 1], 1, 4, 0), "document 1: found 1 tokens"),
        (([5], 0, 4, 0), "lanes: found 0"),
        (([5], 1, 0, 0), "window: found 0"),
        (([5], 1, 4, -1), "seed: found -1"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        scheduler(*arguments)
