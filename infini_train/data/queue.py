"""The order in which documents are read: every dataset epoch after epoch, and several datasets by weight."""

from bisect import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class QueuedDataset(NamedTuple):
    """One of the datasets that a queue mixes.

    Attributes:
        documents: number of documents in the dataset.
        weight, epochs: as in `mixture.Part`.
    """

    documents: int
    weight: float = 1.0
    epochs: int | None = None


class QueuePosition(NamedTuple):
    """Progress through one dataset: the first `position` documents of this epoch's permutation are handed out."""

    epoch: int
    position: int


def epoch_order(documents: int, seed: int, epoch: int, dataset: int = 0) -> Ints:
    """Return the permutation of a dataset's documents for one epoch, int64 [documents].

    It is an argsort of raw Philox output, because numpy guarantees a bit generator's stream across versions, but not
    the result of `Generator.permutation` (NEP 19), and a resumed run may use another numpy.

    Args:
        documents: number of documents in the dataset.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        dataset: number of the dataset in its mixture; every dataset has random numbers of its own.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=dataset << 192)
    return np.argsort(bits.random_raw(documents), kind="stable")


class DocumentQueue:
    """Hands out documents one at a time, until every dataset has used up its epochs (if they are limited).

    The next document comes from the dataset with the smallest (tokens read + H * lanes reading it) / weight; ties go
    to the first such dataset. A dataset without further epochs is skipped. The shares of all tokens read therefore
    converge to the weights.

    H is the mean document length of the dataset with the longest documents, which is roughly what a lane will read
    before it asks again. Without this term all lanes would choose the same dataset at once, and would stay with it
    for as long as its documents last; this matters where one dataset holds books and another short texts.

    Args:
        tokens_D: int64 [documents], tokens of each document, one dataset after the other.
        datasets: the datasets, in the same order.
        seed: seed of the permutations.
        positions: progress through each dataset; None: start at the beginning.
        epoch_documents: for a single dataset that has grown during the epoch in progress, the number of documents
            (the first ones) that this epoch has; 0: all.
    """

    def __init__(
        self,
        tokens_D: Ints,
        datasets: Sequence[QueuedDataset],
        seed: int,
        positions: Sequence[QueuePosition] | None = None,
        epoch_documents: int = 0,
    ):
        assert sum(dataset.documents for dataset in datasets) == len(tokens_D)
        self.datasets, self.seed = datasets, seed
        self.mixed = len(datasets) > 1 or datasets[0].epochs is not None
        self.tokens = np.split(tokens_D, np.cumsum([dataset.documents for dataset in datasets])[:-1])
        # Documents are numbered across datasets; this is the number of each dataset's first one.
        self.first = np.cumsum([0, *(dataset.documents for dataset in datasets)]).tolist()
        self.positions = list(positions) if positions is not None else [QueuePosition(0, 0)] * len(datasets)
        self.sizes = [dataset.documents for dataset in datasets]  # documents in the epoch in progress of each dataset
        if epoch_documents:
            assert len(datasets) == 1 and epoch_documents <= datasets[0].documents
            self.sizes = [epoch_documents]
        self.orders = [self._order(n) for n in range(len(datasets))]
        self.horizon = max(float(tokens.mean()) for tokens in self.tokens)
        # Tokens handed out by dataset. `next` updates them for mixtures only; a single dataset has no use for it
        self.dealt = [
            at.epoch * int(tokens.sum()) + int(tokens[order[: at.position]].sum())
            for at, tokens, order in zip(self.positions, self.tokens, self.orders, strict=True)
        ]

    @property
    def epoch_documents(self) -> int:
        """Documents in the epoch in progress if the dataset has grown since it began, else 0; see `__init__`."""
        return self.sizes[0] if self.sizes[0] != self.datasets[0].documents else 0

    def _order(self, number: int) -> Ints:
        return epoch_order(self.sizes[number], self.seed, self.positions[number].epoch, number)

    def _has_more(self, number: int) -> bool:
        (epoch, position), epochs = self.positions[number], self.datasets[number].epochs
        return epochs is None or epoch + 1 < epochs or position < self.sizes[number]

    def datasets_of(self, documents: Ints) -> Ints:
        """Return the number of each document's dataset, in the shape of `documents`."""
        return np.searchsorted(self.first, documents, side="right") - 1

    def dataset_of(self, document: int) -> int:
        """Return the number of a document's dataset; faster than `datasets_of` for a single document."""
        return bisect(self.first, document) - 1

    def _choose(self, tokens_read: Sequence[int], lanes_reading: Sequence[int]) -> int:
        candidates = [n for n in range(len(self.datasets)) if self._has_more(n)]
        if not candidates:
            raise ValueError(
                f"data.train: found {sum(self.dealt):,} tokens in all epochs, expected enough for trainer.max_steps"
            )
        return min(
            candidates, key=lambda n: (tokens_read[n] + self.horizon * lanes_reading[n]) / self.datasets[n].weight
        )

    def next(self, tokens_read: Sequence[int], lanes_reading: Sequence[int]) -> int:
        """Hand out the next document and return its number.

        Args:
            tokens_read: tokens read so far of each dataset; unused unless the queue is `mixed`.
            lanes_reading: lanes that are reading each dataset now; unused unless the queue is `mixed`.

        Raises:
            ValueError: every dataset has used up its epochs.
        """
        number = self._choose(tokens_read, lanes_reading) if self.mixed else 0
        epoch, position = self.positions[number]
        if position == self.sizes[number]:
            epoch, position = epoch + 1, 0
            self.positions[number] = QueuePosition(epoch, position)
            self.sizes[number] = self.datasets[number].documents
            self.orders[number] = self._order(number)
        document = int(self.orders[number][position])
        self.positions[number] = QueuePosition(epoch, position + 1)
        if self.mixed:
            self.dealt[number] += int(self.tokens[number][document])
        return self.first[number] + document
