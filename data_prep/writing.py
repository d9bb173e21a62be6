"""Writes tokenised documents as datasets: the split, webdataset tars of `BOS tokens EOS`, and their index."""

import json
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.indexing import ABOUT_SUFFIX, TOKENS_SUFFIX, Entry, build_index
from data_prep.split import Split, split_parts
from infini_train.data.index import DatasetIndex
from infini_train.files import atomic_file
from infini_train.tokenizer.loading import Tokenizer

# The header of a member without a name, of no bytes, which every header differs from in three fields.
TEMPLATE = tarfile.TarInfo()
TEMPLATE.mode = 0o444
HEADER = TEMPLATE.tobuf(tarfile.USTAR_FORMAT)
NAME, SIZE, CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 154)  # places of these fields
REST = HEADER[NAME.stop : SIZE.start], HEADER[SIZE.stop : CHECKSUM.start], HEADER[CHECKSUM.stop :]
# As tarfile.calc_chksums counts: the field of the checksum as if it were spaces.
SUM_OF_REST = sum(REST[0]) + sum(REST[1]) + sum(REST[2][2:]) + 8 * ord(" ")
ZEROS = bytes(tarfile.BLOCKSIZE)


@dataclass
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
    shards: list[dict[str, ShardEntries]] = [{} for _ in parts]

    def write(part: int) -> None:
        (root / parts[part]).mkdir(exist_ok=True)
        name = f"shard-{len(shards[part]):05d}.tar"
        shards[part][name] = write_shard(root / parts[part] / name, open_shards[part], tokenizer)
        open_shards[part] = []

    assigned = chain.from_iterable(map(split.add, documents))
    for document, part in chain(assigned, split.finish()):
        if fillers[part].add(document.count) > len(shards[part]):
            write(part)
        open_shards[part].append((totals[part], document))
        totals[part] += 1
    if not all(totals):
        raise ValueError(f"documents: found {sum(totals)}, too few to split")
    indexes = {}
    for number, name in enumerate(parts):
        write(number)
        tokenizer.save(root / name)
        indexes[name] = build_index(root / name, shards[number].items(), tokenizer, options)
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


class ShardEntries:
    """Where the documents of a shard are, in 24 bytes of memory for each; iterating gives their entries in order."""

    def __init__(self) -> None:
        self._numbers, self._offsets, self._sizes = array("q"), array("q"), array("q")

    def add(self, number: int, offset: int, size: int) -> None:
        self._numbers.append(number)
        self._offsets.append(offset)
        self._sizes.append(size)

    def __iter__(self) -> Iterator[Entry]:
        return map(_entry, self._numbers, self._offsets, self._sizes)


def _entry(number: int, offset: int, size: int) -> Entry:
    return Entry(f"{number:09d}", offset, size, {})


def write_shard(path: Path, documents: Iterable[tuple[int, TokenisedDocument]], tokenizer: Tokenizer) -> ShardEntries:
    """Write a webdataset tar of numbered documents, complete or not at all, without holding a document in memory."""
    itemsize = np.dtype(tokenizer.dtype).itemsize
    entries = ShardEntries()
    offset = 0
    with atomic_file(path) as f:
        for number, document in documents:
            size = document.count * itemsize
            about = _about(document, tokenizer)
            # Few writes, of which every one takes time that matters for many short documents.
            before = b"".join(
                [
                    member_header(b"%09d%s" % (number, ABOUT_SUFFIX.encode()), len(about)),
                    about,
                    _padding(len(about)),
                    member_header(b"%09d%s" % (number, TOKENS_SUFFIX.encode()), size),
                ]
            )
            offset += f.write(before)
            entries.add(number, offset, size)
            written = sum(map(f.write, document.data))
            assert written == size, f"document {number}: {written} bytes, expected {size}"
            offset += size + f.write(_padding(size))
        f.write(bytes(2 * tarfile.BLOCKSIZE))
        f.write(bytes(-f.tell() % tarfile.RECORDSIZE))
    return entries


def _about(document: TokenisedDocument, tokenizer: Tokenizer) -> bytes:
    """Return KEY.json of a document, as json.dumps gives it for a dict, which takes several times as long."""
    return (
        f'{{"id": {json.dumps(document.id)}, "source": {json.dumps(document.source)}, "tokens": {document.count}, '
        f'"tokenizer_sha256": "{tokenizer.sha256}"}}'
    ).encode()


def _padding(size: int) -> bytes:
    """Return what follows the content of a member of a tar."""
    return ZEROS[: -size % tarfile.BLOCKSIZE]


def member_header(name: bytes, size: int) -> bytes:
    """Return what `tarfile` writes before a member, a tenth as fast, which matters for many short documents."""
    assert len(name) <= NAME.stop, "names of members are short"
    digits = b"%011o" % size
    if len(digits) > SIZE.stop - SIZE.start:
        raise ValueError(f"{name.decode()}: found {size:,} bytes, expected less than 8 GiB, the limit of a plain tar")
    checksum = SUM_OF_REST + sum(name) + sum(digits)
    return b"".join([name, ZEROS[: NAME.stop - len(name)], REST[0], digits, REST[1], b"%06o" % checksum, REST[2]])
