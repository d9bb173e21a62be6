"""Builds the index of the shards in a directory, whether we or another program wrote them."""

import json
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from rich.progress import track

from infini_train.data.index import INDEX_JSON, SPECIAL_TOKENS, DatasetIndex, Shard, block_digests
from infini_train.files import sha256_of_file
from infini_train.tokenizer.loading import Tokenizer, load_tokenizer

TOKENS_SUFFIX, ABOUT_SUFFIX = ".tokens.bin", ".json"
BLOCK_TOKENS = 1 << 20  # tokens that are checked at once


class Entry(NamedTuple):
    """One document of a shard."""

    key: str
    offset: int  # of the token bytes in the tar
    bytes: int  # size of the token bytes
    about: dict[str, Any]  # KEY.json, empty if there is none


def read_entries(path: Path) -> Iterator[Entry]:
    """Iterate over the documents of a shard in order. As in any webdataset, members with the same key are neighbours.

    Raises:
        ValueError: it is not a complete, uncompressed tar, a key is repeated, or a KEY.json is not a JSON object.
    """
    keys: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for key, members in groupby(_members(tar), itemgetter(0)):
                tokens, about = None, {}
                for _, suffix, member in members:
                    if suffix == TOKENS_SUFFIX:
                        tokens = member
                    else:
                        content = tar.extractfile(member)
                        assert content is not None, "a regular file"
                        about = json.load(content)
                if not isinstance(about, dict):
                    raise ValueError(f"{key}{ABOUT_SUFFIX} is a {type(about).__name__}, expected an object")
                if key in keys:
                    raise ValueError(f"found key {key} again, expected the members of each key one after the other")
                keys.add(key)
                if tokens:
                    yield Entry(key, tokens.offset_data, tokens.size, about)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is truncated or is not an uncompressed tar: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: a {ABOUT_SUFFIX} member is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield key, suffix and member of all tokens and descriptions in a tar."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # or it would keep all members in memory
        for suffix in (TOKENS_SUFFIX, ABOUT_SUFFIX):
            if member.isfile() and member.name.endswith(suffix):
                yield member.name.removesuffix(suffix), suffix, member


class TokenCheck:
    """Finds faults in the tokens of a shard's documents, reading them block by block.

    Args:
        file: the shard.
        dtype: type of a token.
        vocab_size, bos_id, eos_id: of the tokenizer.
    """

    def __init__(
        self, file: BinaryIO, dtype: type[np.unsignedinteger], vocab_size: int, bos_id: int, eos_id: int
    ) -> None:
        self.file, self.dtype = file, dtype
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id

    def fault(self, offset: int, count: int) -> str | None:
        """Return a description of the first fault in the `count` tokens at `offset`, None if there is none."""
        if count < SPECIAL_TOKENS:
            return f"{count} tokens, too few for BOS and EOS"
        self.file.seek(offset)
        for start in range(0, count, BLOCK_TOKENS):
            size = min(BLOCK_TOKENS, count - start) * np.dtype(self.dtype).itemsize
            if len(content := self.file.read(size)) < size:
                return "the file ends in its tokens"
            tokens = np.frombuffer(content, self.dtype)
            if start == 0 and tokens[0] != self.bos_id:
                return f"token 0 is {tokens[0]}, expected BOS ({self.bos_id})"
            if tokens.max() >= self.vocab_size:
                first = int((tokens >= self.vocab_size).argmax())
                return f"token {start + first} is {tokens[first]}, outside the vocabulary of {self.vocab_size}"
        return None if tokens[-1] == self.eos_id else f"the last token is {tokens[-1]}, expected EOS ({self.eos_id})"

    def first_fault(self, offsets: np.ndarray, counts: np.ndarray) -> tuple[int, str] | None:
        """Return number and description of the first fault of documents that follow one another; None if none.

        Args:
            offsets: where the tokens of each document begin, in bytes, ascending.
            counts: the number of its tokens.
        """
        ends = offsets + counts * np.dtype(self.dtype).itemsize
        start = 0
        while start < len(offsets):
            # Documents that end within a block are checked at once, because many of them are short.
            end = max(start + 1, int(np.searchsorted(ends, offsets[start] + BLOCK_TOKENS, "right")))
            if end == start + 1 or not self._sound(offsets[start:end], counts[start:end]):
                for number in range(start, end):
                    if fault := self.fault(int(offsets[number]), int(counts[number])):
                        return number, fault
            start = end
        return None

    def _sound(self, offsets: np.ndarray, counts: np.ndarray) -> bool:
        """Tell whether documents that lie near one another are without a fault."""
        itemsize = np.dtype(self.dtype).itemsize
        starts, odd = np.divmod(offsets - offsets[0], itemsize)
        ends = starts + counts
        if odd.any() or counts.min() < SPECIAL_TOKENS or (ends[:-1] > starts[1:]).any():
            return False
        self.file.seek(int(offsets[0]))
        content = self.file.read(int(ends[-1]) * itemsize)
        if len(content) < ends[-1] * itemsize:
            return False
        tokens = np.frombuffer(content, self.dtype)
        # The largest number of each document, and of what lies between it and the next one.
        largest = np.maximum.reduceat(tokens, np.stack([starts, ends], 1).ravel()[:-1])[::2]
        return bool(
            (tokens[starts] == self.bos_id).all()
            and (tokens[ends - 1] == self.eos_id).all()
            and (largest < self.vocab_size).all()
        )


def build_index(
    root: Path, shards: Iterable[tuple[str, Iterable[Entry]]], tokenizer: Tokenizer, options: dict[str, Any]
) -> DatasetIndex:
    """Build the index of the shards in `root`, without writing it.

    Args:
        root: directory of the shards.
        shards: file names in `root`, in the order of the dataset, and the documents of each file.
        tokenizer: the tokenizer that the shards were made with.
        options: kept in the index.

    Raises:
        ValueError: a tar is broken, a size is wrong, tokens cannot come from this tokenizer, or a KEY.json names
            another one. The message names shard and document.
    """
    found: list[Shard] = []
    numbers, offsets, counts = array("i"), array("q"), array("q")
    digests: list[np.ndarray] = []
    itemsize = np.dtype(tokenizer.dtype).itemsize
    for number, (name, entries) in enumerate(shards):
        path = root / name
        first = len(counts)
        for entry in entries:
            made_with = entry.about.get("tokenizer_sha256", tokenizer.sha256)
            if made_with != tokenizer.sha256:
                raise ValueError(
                    f"{path}, document {entry.key}: made with tokenizer {made_with[:12]}..., not {tokenizer.path}"
                )
            count, rest = divmod(entry.bytes, itemsize)
            if rest:
                raise ValueError(
                    f"{path}, document {entry.key}: {entry.bytes} bytes are not a whole number of {itemsize}-byte "
                    "tokens"
                )
            numbers.append(number)
            offsets.append(entry.offset)
            counts.append(count)
        documents = len(counts) - first
        if not documents:
            raise ValueError(
                f"{path}: found no {TOKENS_SUFFIX} member; for a webdataset of texts, use `infini-train prep shard`"
            )
        with open(path, "rb") as f:
            check = TokenCheck(f, tokenizer.dtype, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
            places = np.array(offsets[first:], np.int64), np.array(counts[first:], np.int64)
            if found_fault := check.first_fault(*places):
                at, fault = found_fault
                key = next(islice(read_entries(path), at, None)).key
                raise ValueError(f"{path}, document {key}: {fault}")
        digests.append(block_digests(path))
        found.append(Shard(name, path.stat().st_size, sha256_of_file(path), documents, sum(counts[first:])))
    return DatasetIndex(
        root=root,
        tokenizer_file=tokenizer.file,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        dtype=tokenizer.dtype,
        shards=found,
        shard_D=np.array(numbers, np.int32),
        offset_D=np.array(offsets, np.int64),
        tokens_D=np.array(counts, np.int64),
        options=options,
        block_digests=np.concatenate(digests),
    )


def index_shards(directory: Path, tokenizer_path: Path, overwrite: bool = False) -> None:
    """Turn a directory of tar shards into a dataset, by adding an index and the tokenizer they were made with.

    Args:
        directory: directory of the shards, in which the files are written.
        tokenizer_path: the tokenizer, as `load_tokenizer` takes it.
        overwrite: replace an existing index.

    Raises:
        FileNotFoundError: there are no shards, or no tokenizer.
        ValueError: there is an index already, or a fault in the shards (see `build_index`).
    """
    tokenizer = load_tokenizer(tokenizer_path)
    names = sorted(path.name for path in directory.glob("*.tar"))
    if not names:
        raise FileNotFoundError(f"no .tar shards in {directory}")
    if (directory / INDEX_JSON).exists() and not overwrite:
        raise ValueError(f"{directory / INDEX_JSON} exists: give --overwrite to replace it")
    shards = ((name, read_entries(directory / name)) for name in track(names, "indexing"))
    index = build_index(directory, shards, tokenizer, {})
    tokenizer.save(directory)
    index.save()
    print(f"{directory}: {index.size}")
