"""Builds the index of the shards in a directory, whether we or another program wrote them."""

import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from infini_train.data.index import INDEX_JSON, SPECIAL_TOKENS, DatasetIndex, Shard, block_digests
from infini_train.files import sha256_of_file
from infini_train.tokenizer.loading import Tokenizer, load_tokenizer

TOKENS_SUFFIX, ABOUT_SUFFIX = ".tokens.bin", ".json"


@dataclass(frozen=True)
class Entry:
    """One document of a shard."""

    key: str
    offset: int  # of the token bytes in the tar
    bytes: int  # size of the token bytes
    about: dict[str, Any]  # KEY.json, empty if there is none


def read_entries(path: Path) -> list[Entry]:
    """List the documents of a shard in order. Raises ValueError if it is not a complete, uncompressed tar."""
    tokens: dict[str, tuple[int, int]] = {}
    about: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.endswith(TOKENS_SUFFIX):
                    tokens[member.name.removesuffix(TOKENS_SUFFIX)] = member.offset_data, member.size
                elif member.name.endswith(ABOUT_SUFFIX):
                    content = tar.extractfile(member)
                    assert content is not None, "a regular file"
                    about[member.name.removesuffix(ABOUT_SUFFIX)] = json.load(content)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is truncated or is not an uncompressed tar: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: a {ABOUT_SUFFIX} member is not JSON: {error}") from None
    return [Entry(key, offset, size, about.get(key, {})) for key, (offset, size) in tokens.items()]


def check_document(tokens: np.ndarray, vocab_size: int, bos_id: int, eos_id: int) -> str | None:
    """Return a description of the first fault in one document's tokens, None if there is none."""
    if len(tokens) < SPECIAL_TOKENS:
        return f"{len(tokens)} tokens, too few for BOS and EOS"
    if tokens[0] != bos_id:
        return f"token 0 is {tokens[0]}, expected BOS ({bos_id})"
    if tokens[-1] != eos_id:
        return f"the last token is {tokens[-1]}, expected EOS ({eos_id})"
    if tokens.max() >= vocab_size:
        first = int((tokens >= vocab_size).argmax())
        return f"token {first} is {tokens[first]}, outside the vocabulary of {vocab_size}"
    return None


def build_index(
    root: Path, shard_names: Iterable[str], tokenizer: Tokenizer, options: dict[str, Any]
) -> DatasetIndex:
    """Build the index of the shards in `root`, without writing it.

    Args:
        root: directory of the shards.
        shard_names: file names in `root`, in the order of the dataset.
        tokenizer: the tokenizer that the shards were made with.
        options: kept in the index.

    Raises:
        ValueError: a tar is broken, a size is wrong, tokens cannot come from this tokenizer, or a KEY.json names
            another one. The message names shard and document.
    """
    shards: list[Shard] = []
    numbers: list[int] = []
    offsets: list[int] = []
    counts: list[int] = []
    digests: list[np.ndarray] = []
    itemsize = np.dtype(tokenizer.dtype).itemsize
    for number, name in enumerate(shard_names):
        path = root / name
        entries = read_entries(path)
        if not entries:
            raise ValueError(
                f"{path}: found no {TOKENS_SUFFIX} member; for a webdataset of texts, use `data_prep shard`"
            )
        for entry in entries:
            where = f"{path}, document {entry.key}"
            made_with = entry.about.get("tokenizer_sha256", tokenizer.sha256)
            if made_with != tokenizer.sha256:
                raise ValueError(f"{where}: made with tokenizer {made_with[:12]}..., not {tokenizer.path}")
            if entry.bytes % itemsize:
                raise ValueError(f"{where}: {entry.bytes} bytes are not a whole number of {itemsize}-byte tokens")
            tokens = np.fromfile(path, tokenizer.dtype, entry.bytes // itemsize, offset=entry.offset)
            if fault := check_document(tokens, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id):
                raise ValueError(f"{where}: {fault}")
            numbers.append(number)
            offsets.append(entry.offset)
            counts.append(len(tokens))
        total = sum(counts[len(counts) - len(entries) :])
        digests.append(block_digests(path))
        shards.append(Shard(name, path.stat().st_size, sha256_of_file(path), len(entries), total))
    return DatasetIndex(
        root=root,
        tokenizer_file=tokenizer.file,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        dtype=tokenizer.dtype,
        shards=shards,
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
    index = build_index(directory, track(names, "indexing"), tokenizer, {})
    tokenizer.save(directory)
    index.save()
    print(f"{directory}: {index.documents:,} documents, {index.total_tokens:,} tokens, {len(names)} shards")
