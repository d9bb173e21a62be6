"""Tokenised documents into datasets: the split, shards of `BOS tokens EOS` in webdataset tars, and their index."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from webdataset import TarWriter

from data_prep.indexing import build_index
from infini_train.data.index import DatasetIndex
from infini_train.files import atomic_file
from infini_train.tokenizer.loading import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """A tokenised document: `data` is `BOS tokens EOS`, little-endian."""

    id: str
    source: str
    data: bytes
    count: int


def write_datasets(
    root: Path, documents: Iterable[Tokens], tokenizer: Tokenizer, options: dict[str, Any]
) -> dict[str, DatasetIndex]:
    """Write the dataset in `root`, or those in `root`/train and `root`/valid; their indexes by place below `root`.

    One shard of each is in memory. `options` are kept in the index. Raises ValueError if there are too few documents.
    """
    parts = ["train", "valid"] if options["validation_fraction"] else ["."]
    open_shards: list[list[tuple[int, Tokens]]] = [[] for _ in parts]
    fillings, totals = [Filling(options["shard_tokens"]) for _ in parts], [0] * len(parts)
    split = Split[Tokens](options["validation_fraction"])
    names: list[list[str]] = [[] for _ in parts]

    def write(part: int) -> None:
        (root / parts[part]).mkdir(exist_ok=True)
        names[part].append(f"shard-{len(names[part]):05d}.tar")
        write_shard(root / parts[part] / names[part][-1], open_shards[part], tokenizer.sha256)
        open_shards[part] = []

    for document, part in chain((dealt for one in documents for dealt in split.add(one)), split.finish()):
        if fillings[part].add(document.count) > len(names[part]):
            write(part)
        open_shards[part].append((totals[part], document))
        totals[part] += 1
    if not all(totals):
        raise ValueError(f"documents: found {sum(totals)}, too few to split")
    indexes = {}
    for number, name in enumerate(parts):
        write(number)
        write_tokenizer(root / name, tokenizer)
        indexes[name] = build_index(root / name, names[number], tokenizer, options)
        indexes[name].save()
    return indexes


class Named(Protocol):
    @property
    def id(self) -> str: ...


AnyDocument = TypeVar("AnyDocument", bound=Named)


class Split(Generic[AnyDocument]):
    """Deals documents to part 0 (train) or 1 (valid) by the hash of their ids alone, so that others change nothing.

    Holds back the document of lowest hash until another goes to valid, so that valid gets at least one; unless `hold`
    is false.
    """

    def __init__(self, fraction: float, hold: bool = True) -> None:
        self.fraction, self.hold = fraction, hold
        self.held: tuple[float, AnyDocument] | None = None
        self.to_valid = 0

    def add(self, document: AnyDocument) -> Iterator[tuple[AnyDocument, int]]:
        rank = int.from_bytes(hashlib.sha256(document.id.encode(errors="surrogatepass")).digest()[:8]) / 2**64
        if rank < self.fraction:
            self.to_valid += 1
            yield document, 1
        elif self.fraction and self.hold and not self.to_valid and (self.held is None or rank < self.held[0]):
            if self.held:
                yield self.held[1], 0
            self.held = rank, document
        else:
            yield document, 0

    def finish(self) -> Iterator[tuple[AnyDocument, int]]:
        if self.held:
            yield self.held[1], 0 if self.to_valid else 1


class Filling:
    """Fills shards with about `shard_tokens` tokens, one after the other; a document is never cut."""

    def __init__(self, shard_tokens: int, first: int = 0) -> None:
        self.shard_tokens, self.shard, self.tokens = shard_tokens, first, 0

    def add(self, tokens: int) -> int:
        """The number of the shard that a document of so many tokens goes to."""
        if self.tokens and self.tokens + tokens > self.shard_tokens:
            self.shard, self.tokens = self.shard + 1, 0
        self.tokens += tokens
        return self.shard


def write_shard(path: Path, documents: Iterable[tuple[int, Tokens]], tokenizer_sha256: str) -> None:
    """A webdataset tar of numbered documents, which appears whole."""
    with atomic_file(path) as f, TarWriter(f, encoder=False, mtime=0, user="", group="") as tar:
        for number, document in documents:
            about = {
                "id": document.id,
                "source": document.source,
                "tokens": document.count,
                "tokenizer_sha256": tokenizer_sha256,
            }
            tar.write({"__key__": f"{number:09d}", "json": json.dumps(about).encode(), "tokens.bin": document.data})


def write_tokenizer(root: Path, tokenizer: Tokenizer) -> None:
    for name, content in tokenizer.files.items():
        with atomic_file(root / name) as f:
            f.write(content)
