"""The global lane scheduler: which tokens every lane reads in every step, as a pure function of the documents'
lengths, the seed, the number of lanes and the window.

Every rank runs it for all lanes, from token counts alone: no communication, no uneven end, and an order that knows
nothing of world size, workers or prefetching.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from .queue import DocumentQueue, Ints, Place, Share


@dataclass(frozen=True, eq=False)
class Cursor:
    """Where the reading stands before a step; with the index, all that determines every later batch.

    step: optimizer steps read so far.
    queue: `epoch:position` of each dataset, with spaces between (DocumentQueue's places).
    doc_L, offset_L: per lane (L of them) its document and the next token of it to read, int64: 16 bytes a lane.
    seed, fingerprint, window: of the run it belongs to; `LaneScheduler` refuses any other.
    epoch_documents: how many documents, the first ones, the epoch in progress has, where the dataset has grown since
        it began; 0: all.
    """

    step: int
    queue: str
    doc_L: Ints
    offset_L: Ints
    seed: int
    fingerprint: str
    window: int
    epoch_documents: int = 0

    @property
    def lanes(self) -> int:
        return len(self.doc_L)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The lanes are one string `doc:offset doc:offset ...`, because Lightning walks every
        list in a batch element by element in the main process (3 ms for 1,024 lanes)."""
        lanes = _written(zip(self.doc_L.tolist(), self.offset_L.tolist(), strict=True))
        return {**{name: getattr(self, name) for name in _SCALARS}, "lanes": lanes}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError naming each field that is missing or of another type."""
        values = {"epoch_documents": 0} | values  # older checkpoints have none
        wrong = [
            f"cursor.{name}: found {values.get(name)!r}, expected {kind.__name__}"
            for name, kind in {**_SCALARS, "lanes": str}.items()
            if type(values.get(name)) is not kind
        ]
        if wrong:
            raise ValueError("\n".join(wrong))
        doc_L, offset_L = _pairs("lanes", values["lanes"]).T.copy()
        return cls(**{name: values[name] for name in _SCALARS}, doc_L=doc_L, offset_L=offset_L)

    def places(self) -> list[Place]:
        """Of the queue. Raises ValueError if `queue` does not tell them."""
        return [Place(*pair) for pair in _pairs("queue", self.queue).tolist()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cursor) and self.to_dict() == other.to_dict()


_SCALARS = {"step": int, "queue": str, "seed": int, "fingerprint": str, "window": int, "epoch_documents": int}


def _written(pairs: Iterable[tuple[int, int]]) -> str:
    return " ".join(f"{a}:{b}" for a, b in pairs)


def _pairs(name: str, text: str) -> Ints:
    """[pairs, 2] of `a:b a:b ...`."""
    pairs = [pair.split(":") for pair in text.split()]
    try:
        return np.array(pairs, dtype=np.int64).reshape(len(pairs), 2)
    except ValueError as e:
        raise ValueError(f"cursor.{name}: found {text[:80]!r}, expected `number:number number:number ...`") from e


class Slices(NamedTuple):
    """Runs of consecutive tokens of one document in one lane (or row), int64 [N] each, in reading order, by lane."""

    lane: Ints
    doc: Ints
    offset: Ints
    length: Ints


class Step(NamedTuple):
    """One window of every lane. labels: number of tokens that have a label, over all lanes."""

    slices: Slices
    labels: int


class LaneScheduler:
    """Deals documents to lanes, window after window, without end.

    A lane reads its document to the end and then takes the next of the queue, inside the same window; where several
    lanes need one in the same step, lower lanes go first. The queue (DocumentQueue) is epoch after epoch without a
    gap.

    Args:
        tokens_D: tokens of each document, at least 2 (BOS and EOS).
        shares: the datasets that they are of, one after the other; None: a single one.
        lanes: rows of the global batch.
        window: tokens a lane reads in a step.
        seed: 0 <= seed < 2**63.
        fingerprint: of the dataset, kept in the cursor.
        cursor: where to start; None: the beginning.
    Raises:
        ValueError: bad arguments, or a cursor of another dataset, seed, window or number of lanes.
    """

    def __init__(
        self,
        tokens_D: NDArray[np.integer],
        *,
        lanes: int,
        window: int,
        seed: int,
        fingerprint: str,
        shares: Sequence[Share] | None = None,
        cursor: Cursor | None = None,
    ):
        self.tokens_D = np.asarray(tokens_D, dtype=np.int64)
        self.window, self.seed, self.fingerprint = window, seed, fingerprint
        wrong = [f"{k}: found {v}, expected at least 1" for k, v in [("lanes", lanes), ("window", window)] if v < 1]
        if not 0 <= seed < 2**63:
            wrong.append(f"seed: found {seed}, expected 0 <= seed < 2**63")
        if not len(self.tokens_D):
            wrong.append("dataset: found no documents, expected at least one")
        elif self.tokens_D.min() < 2:
            doc = int(self.tokens_D.argmin())
            wrong.append(f"document {doc}: found {self.tokens_D[doc]} tokens, expected at least 2 (BOS and EOS)")
        if wrong:
            raise ValueError("\n".join(wrong))
        shares = shares or [Share(len(self.tokens_D))]
        if cursor is None:
            self.step = 0
            self.queue = DocumentQueue(self.tokens_D, shares, seed)
            read, reading = [0] * len(shares), [0] * len(shares)
            self.doc_L = np.array([self._next_document(read, reading) for _ in range(lanes)], dtype=np.int64)
            self.offset_L = np.zeros(lanes, dtype=np.int64)
        else:
            self._check(cursor, lanes, shares)
            self.step = cursor.step
            self.queue = DocumentQueue(self.tokens_D, shares, seed, cursor.places(), cursor.epoch_documents)
            self.doc_L, self.offset_L = cursor.doc_L.copy(), cursor.offset_L.copy()

    def _check(self, cursor: Cursor, lanes: int, shares: Sequence[Share]) -> None:
        expected = {"fingerprint": self.fingerprint, "seed": self.seed, "lanes": lanes, "window": self.window}
        wrong = [
            f"cursor.{name}: found {getattr(cursor, name)}, expected {value}"
            for name, value in expected.items()
            if getattr(cursor, name) != value
        ]
        documents = len(self.tokens_D)
        if not wrong:  # only then do its numbers mean our documents
            if cursor.step < 0:
                wrong.append(f"cursor.step: found {cursor.step}, expected at least 0")
            places = cursor.places()
            if len(places) != len(shares) or not all(
                place.epoch >= 0 and 0 <= place.position <= share.documents
                for place, share in zip(places, shares, strict=True)
            ):
                wrong.append(
                    f"cursor.queue: found {cursor.queue!r}, expected `epoch:position` of each of {len(shares)} "
                    f"datasets, with at most {', '.join(str(share.documents) for share in shares)} documents"
                )
            if not 0 <= cursor.epoch_documents <= (documents if len(shares) == 1 else 0):
                wrong.append(f"cursor.epoch_documents: found {cursor.epoch_documents}, expected 0 to {documents}")
            elif cursor.epoch_documents and places[0].position > cursor.epoch_documents:
                wrong.append(f"cursor.queue: found {cursor.queue!r}, expected at most {cursor.epoch_documents}")
            known_L = (cursor.doc_L >= 0) & (cursor.doc_L < documents)
            length_L = self.tokens_D[np.where(known_L, cursor.doc_L, 0)]
            for lane in np.flatnonzero(~known_L | (cursor.offset_L < 0) | (cursor.offset_L >= length_L))[:1]:
                wrong.append(
                    f"cursor.lanes: found {cursor.doc_L[lane]}:{cursor.offset_L[lane]} in lane {lane}, "
                    f"expected one of {documents} documents and an offset inside it"
                )
        if wrong:
            raise ValueError("\n".join(wrong))

    @property
    def cursor(self) -> Cursor:
        """Of the next step."""
        return Cursor(
            step=self.step,
            queue=_written(self.queue.places),
            doc_L=self.doc_L.copy(),
            offset_L=self.offset_L.copy(),
            seed=self.seed,
            fingerprint=self.fingerprint,
            window=self.window,
            epoch_documents=self.queue.epoch_documents,
        )

    def next_step(self) -> Step:
        """One window of every lane, and moves on."""
        read, reading = [], []
        if self.queue.mixed:
            read = self.tokens_read()
            reading = np.bincount(self.queue.datasets_of(self.doc_L), minlength=len(read)).tolist()
        room_L = self.tokens_D[self.doc_L] - self.offset_L
        going_on = np.flatnonzero(room_L > self.window)  # nearly all lanes where documents are long
        ending = np.flatnonzero(room_L <= self.window).tolist()
        first = [going_on, self.doc_L[going_on], self.offset_L[going_on], np.full(len(going_on), self.window)]
        self.offset_L[going_on] += self.window
        ended = 0
        rows: list[tuple[int, int, int, int]] = []
        for lane in ending:
            doc, offset, left = int(self.doc_L[lane]), int(self.offset_L[lane]), self.window
            while left:
                length = min(int(self.tokens_D[doc]) - offset, left)
                rows.append((lane, doc, offset, length))
                offset, left = offset + length, left - length
                if offset == self.tokens_D[doc]:
                    doc, offset, ended = self._next_document(read, reading, doc), 0, ended + 1
            self.doc_L[lane], self.offset_L[lane] = doc, offset
        self.step += 1
        if rows:
            rest = np.array(rows, dtype=np.int64).T
            columns = [np.concatenate(pair) for pair in zip(first, rest, strict=True)]
            order = np.argsort(columns[0], kind="stable")
            first = [column[order] for column in columns]
        # every token has a label but the last of each document
        return Step(Slices(*first), labels=len(self.doc_L) * self.window - ended)

    def _next_document(self, read: list[int], reading: list[int], after: int | None = None) -> int:
        """For a lane that has read the document `after` to its end; of a mixture, changes `reading`."""
        if self.queue.mixed and after is not None:
            reading[self.queue.dataset_of(after)] -= 1
        doc = self.queue.next(read, reading)
        if self.queue.mixed:
            reading[self.queue.dataset_of(doc)] += 1
        return doc

    def tokens_read(self) -> list[int]:
        """So far, of each dataset of a mixture."""
        assert self.queue.mixed
        unread = np.zeros(len(self.queue.shares), dtype=np.int64)
        np.add.at(unread, self.queue.datasets_of(self.doc_L), self.tokens_D[self.doc_L] - self.offset_L)
        return (np.array(self.queue.dealt) - unread).tolist()
