"""Tokenised documents into datasets: the split, shards of `BOS tokens EOS` in webdataset tars, and their index."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from data_prep.documents import Reject
from data_prep.indexing import build_index
from data_prep.tokenizer import Tokenizer
from infini_train.data.index import DatasetIndex, atomic_file, sync


@dataclass(frozen=True)
class Tokens:
    """A tokenised document: `data` is `BOS tokens EOS`, little-endian."""

    id: str
    source: str
    data: bytes
    count: int


@dataclass(frozen=True)
class Made:
    """Indexes of the datasets by their place below the output, and what was left out, in words."""

    indexes: dict[str, DatasetIndex]
    left_out: str


def write_datasets(
    root: Path, items: Iterable[Tokens | Reject], tokenizer: Tokenizer, options: dict[str, Any], inputs: list[Path]
) -> Made:
    """Write the dataset in `root`, or those in `root`/train and `root`/valid, and `root`/rejects.jsonl.

    `options` are those that shard_corpus keeps in the index. Raises ValueError if there are too few documents.
    """
    parts = ["train", "valid"] if options["validation_fraction"] else ["."]
    writers = [ShardWriter(root / part, options["shard_tokens"], tokenizer) for part in parts]
    split = Split(options["validation_fraction"])
    rejects: Counter[str] = Counter()
    with atomic_file(root / "rejects.jsonl") as rejects_file:
        for item in items:
            if isinstance(item, Reject):
                rejects[item.reason] += 1
                rejects_file.write(json.dumps(asdict(item)).encode() + b"\n")
            else:
                for ready, part in split.add(item):
                    writers[part].add(ready)
    for ready, part in split.finish():
        writers[part].add(ready)
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(rejects.items()))
    documents = sum(writer.total_documents for writer in writers)
    if documents < len(writers):
        what = "no document" if not documents else "a single document, too few to split,"
        because = f" ({left_out} left out)" if left_out else ""
        raise ValueError(f"{what} in {', '.join(map(str, inputs))}{because}")
    return Made({part: writer.close(options) for part, writer in zip(parts, writers, strict=True)}, left_out)


def replace_directory(old: Path, new: Path) -> None:
    """Move the directory `new`, on the same file system, to `old` in place of what is there."""
    replaced = old.with_name(f".{old.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    with suppress(FileNotFoundError):
        old.rename(replaced)
    try:
        new.rename(old)
    except OSError:
        with suppress(FileNotFoundError):
            replaced.rename(old)
        raise
    sync(old.parent)
    shutil.rmtree(replaced, ignore_errors=True)


class Split:
    """Deals documents to part 0 (train) or 1 (valid) by the hash of their ids.

    Holds back the document of lowest hash until another goes to valid, so that valid gets at least one.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.held: tuple[float, Tokens] | None = None
        self.to_valid = 0

    def add(self, document: Tokens) -> Iterator[tuple[Tokens, int]]:
        rank = int.from_bytes(hashlib.sha256(document.id.encode(errors="surrogatepass")).digest()[:8]) / 2**64
        if rank < self.fraction:
            self.to_valid += 1
            yield document, 1
        elif self.fraction and not self.to_valid and (self.held is None or rank < self.held[0]):
            if self.held:
                yield self.held[1], 0
            self.held = rank, document
        else:
            yield document, 0

    def finish(self) -> Iterator[tuple[Tokens, int]]:
        if self.held:
            yield self.held[1], 0 if self.to_valid else 1


class ShardWriter:
    """Writes documents into shards of about `shard_tokens` tokens; a document is never cut."""

    def __init__(self, root: Path, shard_tokens: int, tokenizer: Tokenizer) -> None:
        self.root = root
        self.shard_tokens = shard_tokens
        self.tokenizer = tokenizer
        self.total_documents = self.total_tokens = 0
        self._shards: list[str] = []
        self._open: list[tuple[int, Tokens]] = []  # what the next shard will hold, with its number
        self._open_tokens = 0
        root.mkdir(parents=True, exist_ok=True)

    def add(self, document: Tokens) -> None:
        if self._open and self._open_tokens + document.count > self.shard_tokens:
            self._write_shard()
        self._open.append((self.total_documents, document))
        self._open_tokens += document.count
        self.total_documents += 1
        self.total_tokens += document.count

    def close(self, options: dict[str, Any]) -> DatasetIndex:
        self._write_shard()
        for name, content in self.tokenizer.files.items():
            with atomic_file(self.root / name) as f:
                f.write(content)
        index = build_index(self.root, self._shards, self.tokenizer, options)
        index.save()
        return index

    def _write_shard(self) -> None:
        name = f"shard-{len(self._shards):05d}.tar"
        with (
            atomic_file(self.root / name) as f,
            TarWriter(f, encoder=False, mtime=0, user="", group="") as tar,
        ):
            for number, document in self._open:
                about = {
                    "id": document.id,
                    "source": document.source,
                    "tokens": document.count,
                    "tokenizer_sha256": self.tokenizer.sha256,
                }
                tar.write(
                    {
                        "__key__": f"{number:09d}",
                        "json": json.dumps(about).encode(),
                        "tokens.bin": document.data,
                    }
                )
        self._shards.append(name)
        self._open, self._open_tokens = [], 0
