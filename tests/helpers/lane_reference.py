"""Plain references of the lane scheduler and of the document queue, one token and one document at a time."""

from collections import deque
from itertools import count

import numpy as np

from infini_train.data.lanes import LaneStep

Token = tuple[int, int]  # document, position in it


def reference(tokens_D, lanes, window, seed):
    """Yields per step the list of lanes, each a list of `window` Tokens. One token at a time, no cleverness."""

    def queue():
        for epoch in count():
            keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(len(tokens_D)).tolist()
            yield from sorted(range(len(tokens_D)), key=keys.__getitem__)

    documents = queue()

    def deal():
        doc = next(documents)
        return deque((doc, i) for i in range(tokens_D[doc]))

    streams = [deal() for _ in range(lanes)]
    while True:
        step = []
        for lane in range(lanes):
            row = []
            for _ in range(window):
                row.append(streams[lane].popleft())
                if not streams[lane]:
                    streams[lane] = deal()
            step.append(row)
        yield step


def tokens_of(step: LaneStep, lanes: int) -> list[list[Token]]:
    rows: list[list[Token]] = [[] for _ in range(lanes)]
    assert (np.diff(step.slices.lane) >= 0).all()
    for lane, doc, offset, length in zip(*(c.tolist() for c in step.slices), strict=True):
        assert length > 0
        rows[lane] += [(doc, i) for i in range(offset, offset + length)]
    return rows


def queue_reference(parts, seed, ask):
    """Yields (dataset, document) until no dataset has epochs left; ask() gives read and reading of each dataset."""
    begun: list[list[int]] = [[] for _ in parts]
    horizon = max(sum(lengths) / len(lengths) for lengths, *_ in parts)
    while True:
        candidates, (read, reading) = [], ask()
        for number, (lengths, weight, epochs) in enumerate(parts):
            if epochs is None or len(begun[number]) < epochs * len(lengths):
                candidates.append(((read[number] + horizon * reading[number]) / weight, number))
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
