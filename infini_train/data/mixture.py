"""Several datasets as one to train on, by weight."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .index import DatasetIndex
from .queue import Share
from .reader import TokenReader
from .remote import load_index, reader_of


@dataclass(frozen=True)
class Part:
    """A dataset of a mixture.

    Args:
        path: its directory or URL.
        weight: its share of the tokens is this over the sum of all weights, as long as it has epochs left.
        epochs: how often it may be read; none: without end.
    """

    path: str
    weight: float = 1.0
    epochs: int | None = None


class Mixture:
    """What DatasetIndex is for one dataset, for several: their documents are numbered one dataset after the other.

    Raises FileNotFoundError or ValueError, listing all that is wrong, for parts that cannot be read or do not agree
    in their tokenizer, and for weights or epochs out of range.
    """

    def __init__(self, parts: Sequence[Part], load: Callable[[str], DatasetIndex] = load_index):
        self.parts = parts
        wrong = [] if parts else ["found no dataset, expected at least one"]
        self.indexes: list[DatasetIndex] = []
        for part in parts:
            if part.weight <= 0:
                wrong.append(f"{part.path}: found weight {part.weight}, expected more than 0")
            if part.epochs is not None and part.epochs < 1:
                wrong.append(f"{part.path}: found epochs {part.epochs}, expected at least 1")
            try:
                self.indexes.append(load(part.path))
            except (OSError, ValueError) as e:
                wrong.append(str(e))
        for index in self.indexes[1:]:
            if index.tokenizer_sha256 != self.indexes[0].tokenizer_sha256:
                wrong.append(f"{index.root} was made with another tokenizer than {self.indexes[0].root}")
        if wrong:
            raise ValueError("\n".join(wrong))
        first = self.indexes[0]
        self.root, self.tokenizer_file, self.tokenizer_sha256 = (
            first.root,
            first.tokenizer_file,
            first.tokenizer_sha256,
        )  # of the tokenizer, which all have
        self.vocab_size, self.bos_id, self.eos_id = first.vocab_size, first.bos_id, first.eos_id

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
    def shares(self) -> list[Share]:
        return [
            Share(index.documents, part.weight, part.epochs)
            for index, part in zip(self.indexes, self.parts, strict=True)
        ]

    @property
    def tokens_to_read(self) -> int | None:
        """In all epochs of all parts; None if any part is without end."""
        epochs = [part.epochs for part in self.parts]
        if None in epochs:
            return None
        return sum((n or 0) * index.total_tokens for n, index in zip(epochs, self.indexes, strict=True))

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over all that determines batches: the parts' fingerprints, weights and epochs."""
        told = [
            [index.fingerprint, part.weight, part.epochs]
            for index, part in zip(self.indexes, self.parts, strict=True)
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def check_files(self) -> None:
        """As DatasetIndex.check_files, of every part."""
        for index in self.indexes:
            index.check_files()


class MixtureReader:
    """TokenReader over the documents of a mixture."""

    def __init__(self, index: Mixture):
        self.index = index
        self._first = np.cumsum([0, *(part.documents for part in index.indexes)])
        self._readers = [reader_of(part) for part in index.indexes]

    def read(self, doc: int, offset: int, count: int) -> NDArray[np.unsignedinteger]:
        """As TokenReader.read, by the document's number in the mixture."""
        reader, own = self._of(doc)
        return reader.read(own, offset, count)

    def prefetch(self, doc: int, offset: int, count: int) -> None:
        """As TokenReader.prefetch."""
        reader, own = self._of(doc)
        reader.prefetch(own, offset, count)

    def _of(self, doc: int) -> tuple[TokenReader, int]:
        part = int(np.searchsorted(self._first, doc, side="right")) - 1
        return self._readers[part], doc - int(self._first[part])


def parts_of(given: str | Sequence[Part | dict[str, Any]]) -> list[Part]:
    """`data.train` as a list: a directory, or parts, which a configuration file has as dictionaries."""
    if isinstance(given, str):
        return [Part(given)]
    return [part if isinstance(part, Part) else Part(**part) for part in given]


def load_training_data(
    given: str | Sequence[Part | dict[str, Any]], load: Callable[[str], DatasetIndex] = load_index
) -> DatasetIndex | Mixture:
    """The index of a dataset, or the mixture of several. Raises as they do."""
    return load(given) if isinstance(given, str) else Mixture(parts_of(given), load)


def name_of(path: str) -> str:
    """Of a dataset, for people: the last two parts of its path."""
    return "/".join(Path(path).parts[-2:])
