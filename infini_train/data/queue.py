"""Which document comes next: each dataset epoch after epoch, several of them by weight."""

from bisect import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Share(NamedTuple):
    """One of the datasets that a queue mixes: its number of documents, its weight over those of the others (shares of
    tokens), and how many epochs of it there are (None: without end)."""

    documents: int
    weight: float = 1.0
    epochs: int | None = None


class Place(NamedTuple):
    """Where a dataset stands in a queue: `position` documents of this epoch's permutation are handed out."""

    epoch: int
    position: int


def epoch_order(documents: int, seed: int, epoch: int, dataset: int = 0) -> Ints:
    """The permutation of all documents of a dataset (by its number) that is epoch `epoch`, int64 [documents].

    Sorts raw Philox output, because numpy keeps a bit generator's stream over versions, but not that of
    `Generator.permutation` (NEP 19), and a resumed run may have another numpy.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=dataset << 192)
    return np.argsort(bits.random_raw(documents), kind="stable")


class DocumentQueue:
    """Hands out documents without end, or to the last epoch of every dataset.

    The next document is of the dataset with the least (tokens read + H x lanes that read it now) / weight; of equals,
    the first. H, the mean document length of the dataset that has the longest, is about what such a lane will read
    before it asks again. Without that term all lanes would take the same dataset at once, and keep to it for as long
    as its documents are, where one has books and another short texts. Shares of all tokens read come to the weights.
    A dataset without further epochs is passed over.

    Args:
        tokens_D: tokens of each document, one dataset after the other.
        shares: the datasets.
        seed: of the permutations.
        places: where each dataset stands; None: the beginning.
        epoch_documents: of a single dataset that has grown during the epoch, how many documents that epoch has, the
            first ones; 0: all.
    """

    def __init__(
        self,
        tokens_D: Ints,
        shares: Sequence[Share],
        seed: int,
        places: Sequence[Place] | None = None,
        epoch_documents: int = 0,
    ):
        assert sum(share.documents for share in shares) == len(tokens_D)
        self.shares, self.seed = shares, seed
        self.mixed = len(shares) > 1 or shares[0].epochs is not None
        self.tokens = np.split(tokens_D, np.cumsum([share.documents for share in shares])[:-1])
        self.first = np.cumsum([0, *(share.documents for share in shares)]).tolist()  # number of its first document
        places = places if places is not None else [Place(0, 0)] * len(shares)
        self.epochs, self.positions = [place.epoch for place in places], [place.position for place in places]
        self.sizes = [share.documents for share in shares]  # documents of the epoch that each dataset is in
        if epoch_documents:
            assert len(shares) == 1 and epoch_documents <= shares[0].documents
            self.sizes = [epoch_documents]
        self.orders = [self._order(n) for n in range(len(shares))]
        self.horizon = max(float(tokens.mean()) for tokens in self.tokens)
        self.dealt = [  # tokens handed out of each dataset; kept where it decides, as every document costs time
            place.epoch * int(tokens.sum()) + int(tokens[order[: place.position]].sum())
            for place, tokens, order in zip(places, self.tokens, self.orders, strict=True)
        ]

    @property
    def places(self) -> list[Place]:
        """Where each dataset stands."""
        return [Place(*place) for place in zip(self.epochs, self.positions, strict=True)]

    @property
    def epoch_documents(self) -> int:
        """As of `__init__`."""
        return self.sizes[0] if self.sizes[0] != self.shares[0].documents else 0

    def _order(self, number: int) -> Ints:
        return epoch_order(self.sizes[number], self.seed, self.epochs[number], number)

    def _left(self, number: int) -> bool:
        epochs = self.shares[number].epochs
        return epochs is None or self.epochs[number] + 1 < epochs or self.positions[number] < self.sizes[number]

    def datasets_of(self, documents: Ints) -> Ints:
        """`dataset_of` of each, in the same shape."""
        return np.searchsorted(self.first, documents, side="right") - 1

    def dataset_of(self, document: int) -> int:
        """Number of the dataset that a document is of."""
        return bisect(self.first, document) - 1

    def _choice(self, read: Sequence[int], reading: Sequence[int]) -> int:
        waiting = [n for n in range(len(self.shares)) if self._left(n)]
        if not waiting:
            raise ValueError(
                f"train: found {sum(self.dealt):,} tokens in all epochs of its datasets, too few for max_steps"
            )
        return min(waiting, key=lambda n: (read[n] + self.horizon * reading[n]) / self.shares[n].weight)

    def next(self, read: Sequence[int], reading: Sequence[int]) -> int:
        """A document's number; read, reading: of each dataset of a mixture, tokens read so far and lanes at it now.

        Raises ValueError if all epochs of all datasets are over.
        """
        number = self._choice(read, reading) if self.mixed else 0
        if self.positions[number] == self.sizes[number]:
            self.epochs[number] += 1
            self.positions[number] = 0
            self.sizes[number] = self.shares[number].documents
            self.orders[number] = self._order(number)
        document = int(self.orders[number][self.positions[number]])
        self.positions[number] += 1
        if self.mixed:
            self.dealt[number] += int(self.tokens[number][document])
        return self.first[number] + document
