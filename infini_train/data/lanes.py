"""The lane scheduler decides which tokens every lane reads in every step.

Its decisions are a pure function of the documents' lengths, the seed, the number of lanes and the window. Every rank
runs the scheduler for all lanes from token counts alone. The ranks therefore agree without communication, none of
them runs out of data before the others, and the order does not depend on world size, workers or prefetching.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from .queue import DocumentQueue, Ints, QueuedDataset, QueuePosition


@dataclass(frozen=True, eq=False)
class Cursor:
    """The scheduler's state before a step. Together with the index it determines every later batch.

    Exact resuming rests on it: a batch carries the cursor after its step, and `Checkpointer` (training/checkpoint.py)
    saves that of the last step and gives it to `LaneDataModule.cursor` when the run resumes.

    Attributes:
        step: optimizer steps read so far.
        queue: `epoch:position` of each dataset, separated by spaces (DocumentQueue.positions).
        doc_L: int64 [lanes], the document that each lane reads.
        offset_L: int64 [lanes], the next token of that document to read.
        seed, fingerprint, window: those of the run; `LaneScheduler` refuses a cursor of any other.
        epoch_documents: number of documents in the epoch in progress if the dataset has grown since this epoch began;
            they are its first ones, and the new ones wait for the next epoch. 0: the epoch has all documents.
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
        """Return plain values for JSON.

        The lanes become one string, `doc:offset doc:offset ...`, because Lightning visits every list in a batch
        element by element in the main process (3 ms for 1,024 lanes).
        """
        lanes = _format_pairs(zip(self.doc_L.tolist(), self.offset_L.tolist(), strict=True))
        return {**{name: getattr(self, name) for name in _SCALARS}, "lanes": lanes}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises ValueError that names each field that is missing or of another type."""
        values = {"epoch_documents": 0} | values  # checkpoints of earlier versions lack this field
        wrong = [
            f"cursor.{name}: found {values.get(name)!r}, expected {kind.__name__}"
            for name, kind in {**_SCALARS, "lanes": str}.items()
            if type(values.get(name)) is not kind
        ]
        if wrong:
            raise ValueError("\n".join(wrong))
        doc_L, offset_L = _parse_pairs("lanes", values["lanes"]).T.copy()
        return cls(**{name: values[name] for name in _SCALARS}, doc_L=doc_L, offset_L=offset_L)

    def queue_positions(self) -> list[QueuePosition]:
        """Parse `queue`. Raises ValueError if it has another form."""
        return [QueuePosition(*pair) for pair in _parse_pairs("queue", self.queue).tolist()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cursor) and self.to_dict() == other.to_dict()


_SCALARS = {"step": int, "queue": str, "seed": int, "fingerprint": str, "window": int, "epoch_documents": int}


def _format_pairs(pairs: Iterable[tuple[int, int]]) -> str:
    return " ".join(f"{a}:{b}" for a, b in pairs)


def _parse_pairs(name: str, text: str) -> Ints:
    """Parse `a:b a:b ...` into int64 [pairs, 2]. Raises ValueError that names the cursor's field `name`."""
    pairs = [pair.split(":") for pair in text.split()]
    try:
        return np.array(pairs, dtype=np.int64).reshape(len(pairs), 2)
    except ValueError as e:
        raise ValueError(f"cursor.{name}: found {text[:80]!r}, expected `number:number number:number ...`") from e


class Slices(NamedTuple):
    """N runs of consecutive tokens, sorted by lane and in reading order within a lane; each field is int64 [N].

    Slice i holds `length[i]` tokens of document `doc[i]`, from token `offset[i]` on, and lane `lane[i]` reads it. In
    a `BatchPlan`, `lane[i]` is a row of the micro-batch instead.
    """

    lane: Ints
    doc: Ints
    offset: Ints
    length: Ints


class LaneStep(NamedTuple):
    """One window of every lane, and the number of tokens in these windows that have a label."""

    slices: Slices
    labels: int


class LaneScheduler:
    """Assigns documents to lanes, window after window, without end.

    A lane reads its document to the end, and then continues in the same window with the next document of the queue
    (DocumentQueue). If several lanes need a document in the same step, lower lanes go first.

    Args:
        tokens_D: int [documents], tokens of each document, at least 2 (BOS and EOS).
        lanes: rows of the global batch.
        window: tokens that a lane reads in a step.
        seed: seed of the document order, 0 <= seed < 2**63.
        fingerprint: fingerprint of the dataset, which is stored in the cursor.
        datasets: the datasets of a mixture, in the order of their documents in tokens_D; None: a single dataset.
        cursor: where to start; None: at the beginning.

    Raises:
        ValueError: for bad arguments, or a cursor of another dataset, seed, window or number of lanes.
    """

    def __init__(
        self,
        tokens_D: NDArray[np.integer],
        *,
        lanes: int,
        window: int,
        seed: int,
        fingerprint: str,
        datasets: Sequence[QueuedDataset] | None = None,
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
        datasets = datasets or [QueuedDataset(len(self.tokens_D))]
        if cursor is None:
            self.step = 0
            self.queue = DocumentQueue(self.tokens_D, datasets, seed)
            tokens_read, lanes_reading = [0] * len(datasets), [0] * len(datasets)
            self.doc_L = np.array(
                [self._next_document(tokens_read, lanes_reading) for _ in range(lanes)], dtype=np.int64
            )
            self.offset_L = np.zeros(lanes, dtype=np.int64)
        else:
            self._check(cursor, lanes, datasets)
            self.step = cursor.step
            self.queue = DocumentQueue(
                self.tokens_D, datasets, seed, cursor.queue_positions(), cursor.epoch_documents
            )
            self.doc_L, self.offset_L = cursor.doc_L.copy(), cursor.offset_L.copy()

    @property
    def cursor(self) -> Cursor:
        """The state before the next step."""
        return Cursor(
            step=self.step,
            queue=_format_pairs(self.queue.positions),
            doc_L=self.doc_L.copy(),
            offset_L=self.offset_L.copy(),
            seed=self.seed,
            fingerprint=self.fingerprint,
            window=self.window,
            epoch_documents=self.queue.epoch_documents,
        )

    def next_step(self) -> LaneStep:
        """Return the next window of every lane, and advance the cursor past it."""
        tokens_read, lanes_reading = [], []  # by dataset; only a mixture needs them
        if self.queue.mixed:
            tokens_read = self.tokens_read()
            datasets_L = self.queue.datasets_of(self.doc_L)
            lanes_reading = np.bincount(datasets_L, minlength=len(tokens_read)).tolist()
        unread_L = self.tokens_D[self.doc_L] - self.offset_L
        continuing = np.flatnonzero(unread_L > self.window)
        ending = np.flatnonzero(unread_L <= self.window).tolist()

        # A lane whose document fills the window and continues after it takes a single slice. With long documents
        # nearly all lanes are of this kind, so vector operations handle them together.
        columns = [  # of Slices
            continuing,
            self.doc_L[continuing],
            self.offset_L[continuing],
            np.full(len(continuing), self.window),
        ]
        self.offset_L[continuing] += self.window

        # The other lanes end their document in this window and fill the rest of it with the next documents.
        ended = 0
        rows: list[tuple[int, int, int, int]] = []
        for lane in ending:
            doc, offset, left = int(self.doc_L[lane]), int(self.offset_L[lane]), self.window
            while left:
                length = min(int(self.tokens_D[doc]) - offset, left)
                rows.append((lane, doc, offset, length))
                offset, left = offset + length, left - length
                if offset == self.tokens_D[doc]:
                    doc, offset, ended = self._next_document(tokens_read, lanes_reading, doc), 0, ended + 1
            self.doc_L[lane], self.offset_L[lane] = doc, offset
        self.step += 1

        # Merge both kinds, sorted by lane. The sort is stable, so the slices of a lane stay in reading order.
        if rows:
            of_ending = np.array(rows, dtype=np.int64).T
            columns = [np.concatenate(pair) for pair in zip(columns, of_ending, strict=True)]
            order = np.argsort(columns[0], kind="stable")
            columns = [column[order] for column in columns]
        # Every token has a label except the last one of each document.
        return LaneStep(Slices(*columns), labels=len(self.doc_L) * self.window - ended)

    def _next_document(self, tokens_read: list[int], lanes_reading: list[int], after: int | None = None) -> int:
        """Take the next document from the queue for one lane. If the queue is mixed, keep `lanes_reading` up to date.

        Args:
            tokens_read, lanes_reading: as in DocumentQueue.next; the second is changed in place.
            after: the document that the lane has just read to its end; None for its first document.
        """
        if self.queue.mixed and after is not None:
            lanes_reading[self.queue.dataset_of(after)] -= 1
        doc = self.queue.next(tokens_read, lanes_reading)
        if self.queue.mixed:
            lanes_reading[self.queue.dataset_of(doc)] += 1
        return doc

    def _check(self, cursor: Cursor, lanes: int, datasets: Sequence[QueuedDataset]) -> None:
        expected = {
            "fingerprint": (self.fingerprint, "it is of another dataset than data.train"),
            "seed": (self.seed, f"its documents are in the order of data.seed {cursor.seed}, not {self.seed}"),
            "lanes": (lanes, f"it has {cursor.lanes} lanes (data.lanes), not {lanes}"),
            "window": (
                self.window,
                f"it has windows of {cursor.window} tokens (data.segment_length * data.segments_per_window), "
                f"not {self.window}",
            ),
        }
        wrong = [
            f"{sentence} (cursor.{name}: found {getattr(cursor, name)}, expected {value})"
            for name, (value, sentence) in expected.items()
            if getattr(cursor, name) != value
        ]
        if wrong:
            wrong.insert(0, "the checkpoint's position in the data does not fit this run's options:")
            wrong.append(
                "give the options of the run that wrote it; or begin a new --run at step 0 with only its weights: "
                "--ckpt_path CHECKPOINT --restore weights"
            )
        documents = len(self.tokens_D)
        if not wrong:  # the cursor is of this dataset, so its document numbers can be checked
            if cursor.step < 0:
                wrong.append(f"cursor.step: found {cursor.step}, expected at least 0")
            positions = cursor.queue_positions()
            if len(positions) != len(datasets) or not all(
                at.epoch >= 0 and 0 <= at.position <= dataset.documents
                for at, dataset in zip(positions, datasets, strict=True)
            ):
                wrong.append(
                    f"cursor.queue: found {cursor.queue!r}, expected `epoch:position` of each of {len(datasets)} "
                    f"datasets, with at most {', '.join(str(dataset.documents) for dataset in datasets)} documents"
                )
            if not 0 <= cursor.epoch_documents <= (documents if len(datasets) == 1 else 0):
                wrong.append(f"cursor.epoch_documents: found {cursor.epoch_documents}, expected 0 to {documents}")
            elif cursor.epoch_documents and positions[0].position > cursor.epoch_documents:
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

    def tokens_read(self) -> list[int]:
        """Return how many tokens of each dataset of a mixture have been read so far.

        These are the tokens of all documents handed out, minus those that lanes have not read yet.
        """
        assert self.queue.mixed
        unread = np.zeros(len(self.queue.datasets), dtype=np.int64)
        np.add.at(unread, self.queue.datasets_of(self.doc_L), self.tokens_D[self.doc_L] - self.offset_L)
        return (np.array(self.queue.dealt) - unread).tolist()
