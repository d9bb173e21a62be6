"""Writes tokenised documents as datasets: the split, webdataset tars of `BOS tokens EOS`, and their index."""

import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.indexing import ABOUT_SUFFIX, TOKENS_SUFFIX, build_index
from data_prep.split import Split, split_parts
from infini_train.data.index import DatasetIndex
from infini_train.files import atomic_file
from infini_train.tokenizer.loading import Tokenizer


@dataclass(frozen=True)
class TokenisedDocument:
    """A document that is ready to be written."""

    id: str
    source: str
    data: Iterable[bytes]  # `BOS tokens EOS`, little-endian in the dataset's dtype, in parts of any size
    count: int  # tokens in `data`


def write_datasets(
    root: Path, documents: Iterable[TokenisedDocument], tokenizer: Tokenizer, options: dict[str, Any]
) -> dict[str, DatasetIndex]:
    """Write the dataset in `root`, or those of a split in `root`/train and so on, holding one shard of each in RAM.

    Args:
        root: directory to write to.
        documents: all documents, in order.
        tokenizer: the tokenizer that they were made with.
        options: kept in the index; those of the split and `shard_tokens` are used here.

    Returns:
        The indexes, by subdirectory of `root`.

    Raises:
        ValueError: there are too few documents.
    """
    parts = split_parts(options)
    open_shards: list[list[tuple[int, TokenisedDocument]]] = [[] for _ in parts]
    fillers, totals = [ShardFiller(options["shard_tokens"]) for _ in parts], [0] * len(parts)
    split = Split[TokenisedDocument](options)
    names: list[list[str]] = [[] for _ in parts]

    def write(part: int) -> None:
        (root / parts[part]).mkdir(exist_ok=True)
        names[part].append(f"shard-{len(names[part]):05d}.tar")
        write_shard(root / parts[part] / names[part][-1], open_shards[part], tokenizer)
        open_shards[part] = []

    assigned = chain.from_iterable(map(split.add, documents))
    for document, part in chain(assigned, split.finish()):
        if fillers[part].add(document.count) > len(names[part]):
            write(part)
        open_shards[part].append((totals[part], document))
        totals[part] += 1
    if not all(totals):
        raise ValueError(f"documents: found {sum(totals)}, too few to split")
    indexes = {}
    for number, name in enumerate(parts):
        write(number)
        tokenizer.save(root / name)
        indexes[name] = build_index(root / name, names[number], tokenizer, options)
        indexes[name].save()
    return indexes


class ShardFiller:
    """Assigns documents to shards of about `shard_tokens` tokens, one after the other; documents are never cut."""

    def __init__(self, shard_tokens: int, first: int = 0) -> None:
        self.shard_tokens, self.shard, self.tokens = shard_tokens, first, 0

    def add(self, tokens: int) -> int:
        """Return the number of the shard to which the next document, with so many tokens, goes."""
        if self.tokens and self.tokens + tokens > self.shard_tokens:
            self.shard, self.tokens = self.shard + 1, 0
        self.tokens += tokens
        return self.shard


def write_shard(path: Path, documents: Iterable[tuple[int, TokenisedDocument]], tokenizer: Tokenizer) -> None:
    """Write a webdataset tar of numbered documents, complete or not at all, without holding a document in memory."""
    size = np.dtype(tokenizer.dtype).itemsize
    with atomic_file(path) as f:
        for number, document in documents:
            about = {
                "id": document.id,
                "source": document.source,
                "tokens": document.count,
                "tokenizer_sha256": tokenizer.sha256,
            }
            content = json.dumps(about).encode()
            _write_member(f, f"{number:09d}{ABOUT_SUFFIX}", len(content), [content])
            _write_member(f, f"{number:09d}{TOKENS_SUFFIX}", document.count * size, document.data)
        f.write(bytes(2 * tarfile.BLOCKSIZE))
        f.write(bytes(-f.tell() % tarfile.RECORDSIZE))


def _write_member(f: BinaryIO, name: str, size: int, content: Iterable[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    f.write(member.tobuf(tarfile.USTAR_FORMAT))
    written = sum(map(f.write, content))
    assert written == size, f"{name}: {written} bytes, expected {size}"
    f.write(bytes(-size % tarfile.BLOCKSIZE))
