"""A weighted mixture of several datasets, to train on as if it were one."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .index import DatasetIndex
from .queue import QueuedDataset
from .reader import TokenReader
from .remote import load_index, reader_of


@dataclass(frozen=True)
class Part:
    """A dataset of a mixture.

    Args:
        path: directory or URL of the dataset.
        weight: the dataset's share of the tokens is this weight over the sum of all weights, as long as it has epochs
            left.
        epochs: how often the dataset may be read; none: without limit.
    """

    path: str
    weight: float = 1.0
    epochs: int | None = None


class Mixture:
    """The index of several datasets together, with the interface of DatasetIndex.

    Documents are numbered across the datasets, one after the other.

    Args:
        parts: the datasets with their weights.
        load: loads the index of the dataset at a path.

    Raises:
        ValueError: lists everything that is wrong: parts that cannot be read or have different tokenizers, and
            weights or epochs out of range.
    """

    def __init__(self, parts: Sequence[Part], load: Callable[[str], DatasetIndex] = load_index):
        self.parts = parts
        wrong = [] if parts else ["found no dataset, expected at least one"]
        self.indexes: list[DatasetIndex] = []
        for part in parts:
            if not 0 < part.weight < math.inf:
                wrong.append(f"{part.path}: found weight {part.weight}, expected more than 0")
            if part.epochs is not None and part.epochs < 1:
                wrong.append(f"{part.path}: found epochs {part.epochs}, expected at least 1")
            try:
                self.indexes.append(load(part.path))
            except (OSError, ValueError) as e:
                wrong.append(str(e))
        for index in self.indexes[1:]:
            if index.tokenizer_sha256 != self.indexes[0].tokenizer_sha256:
                wrong.append(f"{index.root}: found another tokenizer, expected that of {self.indexes[0].root}")
        if wrong:
            raise ValueError("\n".join(wrong))
        # All parts have the same tokenizer; `root` is where its file can be read.
        first = self.indexes[0]
        self.root, self.tokenizer_file = first.root, first.tokenizer_file
        self.tokenizer_sha256, self.vocab_size = first.tokenizer_sha256, first.vocab_size
        self.bos_id, self.eos_id = first.bos_id, first.eos_id

    @cached_property
    def tokens_D(self) -> NDArray[np.int64]:
        return np.concatenate([index.tokens_D for index in self.indexes])

    @property
    def documents(self) -> int:
        return len(self.tokens_D)

    @property
    def total_tokens(self) -> int:
        return int(self.tokens_D.sum())

    @property
    def queued(self) -> list[QueuedDataset]:
        """The datasets as `DocumentQueue` takes them."""
        return [
            QueuedDataset(index.documents, part.weight, part.epochs)
            for index, part in zip(self.indexes, self.parts, strict=True)
        ]

    @property
    def tokens_to_read(self) -> int | None:
        """Tokens in all epochs of all parts; None if a part may be read without limit."""
        epochs = [part.epochs for part in self.parts]
        if None in epochs:
            return None
        return sum((n or 0) * index.total_tokens for n, index in zip(epochs, self.indexes, strict=True))

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over everything that determines batches: the parts' fingerprints, weights and epochs."""
        parts = [
            [index.fingerprint, part.weight, part.epochs]
            for index, part in zip(self.indexes, self.parts, strict=True)
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def check_files(self) -> None:
        """Check the files of every part; see DatasetIndex.check_files."""
        for index in self.indexes:
            index.check_files()


class MixtureReader:
    """Reads slices of the documents of a mixture, with the interface of TokenReader."""

    def __init__(self, index: Mixture):
        self.index = index
        self._first = np.cumsum([0, *(part.documents for part in index.indexes)])
        self._readers = [reader_of(part) for part in index.indexes]

    def read(self, doc: int, offset: int, count: int) -> NDArray[np.unsignedinteger]:
        """See TokenReader.read; `doc` is the document's number in the mixture."""
        reader, own = self.locate(doc)
        return reader.read(own, offset, count)

    def prefetch(self, doc: int, offset: int, count: int) -> None:
        """See TokenReader.prefetch; `doc` is the document's number in the mixture."""
        reader, own = self.locate(doc)
        reader.prefetch(own, offset, count)

    def locate(self, doc: int) -> tuple[TokenReader, int]:
        """Return the reader of a document's dataset, and the document's number in that dataset."""
        part = int(np.searchsorted(self._first, doc, side="right")) - 1
        return self._readers[part], doc - int(self._first[part])


def parts_of(given: str | Sequence[Part | dict[str, Any]]) -> list[Part]:
    """Return the option `data.train` as a list of parts; a configuration file gives them as dictionaries."""
    if isinstance(given, str):
        return [Part(given)]
    return [part if isinstance(part, Part) else Part(**part) for part in given]


def load_training_data(
    given: str | Sequence[Part | dict[str, Any]], load: Callable[[str], DatasetIndex] = load_index
) -> DatasetIndex | Mixture:
    """Load the index of the dataset, or of the mixture of datasets, that the option `data.train` names.

    Raises:
        OSError, ValueError: see `load_index` and `Mixture`.
    """
    return load(given) if isinstance(given, str) else Mixture(parts_of(given), load)


def name_of(path: str) -> str:
    """Return a short name of the dataset at `path` for display: the last two components of the path."""
    return "/".join(Path(path).parts[-2:])
