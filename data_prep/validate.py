"""Checks every file, checksum, offset and token of a dataset."""

import json
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from data_prep.indexing import TokenCheck, read_entries
from data_prep.parallel import ordered_map, progress_bar
from data_prep.seen import SEEN
from data_prep.split import split_parts
from infini_train.data.index import BLOCK_BYTES, INDEX_JSON, DatasetIndex, block_digests
from infini_train.files import sha256_of_file
from infini_train.tokenizer.loading import load_tokenizer


def validate_dataset(directory: Path, workers: int = 1) -> list[str]:
    """Find the faults of a dataset: those of its files as a whole, and the first one of each shard.

    Args:
        directory: the dataset.
        workers: number of processes.

    Returns:
        A message for each fault.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: the index cannot be read.
    """
    index = DatasetIndex.load(directory)
    faults = _tokenizer_faults(index) + _file_faults(index)
    with progress_bar() as progress:
        task = progress.add_task("validating", total=sum(shard.bytes for shard in index.shards), note="")
        numbers = range(len(index.shards))
        for number, fault in enumerate(ordered_map(partial(_shard_fault, index), numbers, workers)):
            if fault:
                faults.append(f"{index.shards[number].name}: {fault}")
            progress.update(task, advance=index.shards[number].bytes)
    return faults


def _tokenizer_faults(index: DatasetIndex) -> list[str]:
    """Return the faults of the dataset's tokenizer file."""
    try:
        tokenizer = load_tokenizer(index.root / index.tokenizer_file)
    except (OSError, ValueError) as error:
        return [str(error)]
    if tokenizer.sha256 != index.tokenizer_sha256:
        return [
            f"{index.tokenizer_file}: sha256 is {tokenizer.sha256[:12]}..., the dataset was made with "
            f"{index.tokenizer_sha256[:12]}...: it is another tokenizer"
        ]
    found = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id
    stated = index.vocab_size, index.bos_id, index.eos_id
    if found != stated:
        return [f"{index.tokenizer_file}: vocab_size, bos_id, eos_id are {found}, the index says {stated}"]
    return []


def _file_faults(index: DatasetIndex) -> list[str]:
    """Return faults of the index's counts, and files that are missing or should not be there."""
    stated = json.loads((index.root / INDEX_JSON).read_bytes())["fingerprint"]
    faults = [] if stated == index.fingerprint else [f"{INDEX_JSON}: its fingerprint is not that of its contents"]
    listed = {shard.name for shard in index.shards}
    found = {str(path.relative_to(index.root)) for path in index.root.glob("**/*.tar")}
    faults += [f"{name}: the index does not list this shard" for name in sorted(found - listed)]
    if "min_tokens" in index.options:  # `shard` made it, so `append` can add to it
        seen = (index.root if split_parts(index.options) == ["."] else index.root.parent) / SEEN
        try:
            with np.load(seen, allow_pickle=False) as arrays:
                rows = {len(arrays[name]) for name in ("texts", "ids")}
            if len(rows) != 1:
                faults.append(f"{seen.name}: it is not that of this dataset, which `infini-train prep append` needs")
        except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
            faults.append(f"{seen} cannot be read, which `infini-train prep append` needs: {error}")
    return faults


def _shard_fault(index: DatasetIndex, number: int) -> str | None:
    """Return the first fault of a shard; the checks that explain most come first."""
    shard = index.shards[number]
    path = index.root / shard.name
    if not path.is_file():
        return "the file is missing"
    try:
        if (size := path.stat().st_size) != shard.bytes:
            return f"{size:,} bytes, the index says {shard.bytes:,}"
        if fault := _document_fault(index, number, path):
            return fault
        if (found := sha256_of_file(path)) != shard.sha256:
            return f"sha256 is {found[:12]}..., the index says {shard.sha256[:12]}...: some byte was changed"
        if index.block_digests is not None:
            blocks = [-(-other.bytes // BLOCK_BYTES) for other in index.shards[: number + 1]]
            if not np.array_equal(block_digests(path), index.block_digests[sum(blocks[:-1]) : sum(blocks)]):
                return "the digests of its blocks in the index are wrong"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _document_fault(index: DatasetIndex, number: int, path: Path) -> str | None:
    """Return the first fault of a shard's documents. Raises ValueError if the shard is not a complete tar."""
    documents = np.flatnonzero(index.shard_D == number)
    itemsize = np.dtype(index.dtype).itemsize
    with open(path, "rb") as f:
        check = TokenCheck(f, index.dtype, index.vocab_size, index.bos_id, index.eos_id)
        entries = 0
        for entries, entry in enumerate(read_entries(path), start=1):
            if entries > len(documents):
                continue  # count all of them
            document = documents[entries - 1]
            where = f"document {document} ({entry.key})"
            offset, count = int(index.offset_D[document]), int(index.tokens_D[document])
            if (entry.offset, entry.bytes) != (offset, count * itemsize):
                return (
                    f"{where}: {entry.bytes} token bytes at offset {entry.offset}, the index says "
                    f"{count * itemsize} at {offset}"
                )
            if fault := check.fault(offset, count):
                return f"{where}: {fault}"
            if entry.about.get("tokens", count) != count:
                return f"{where}: its .json says {entry.about['tokens']} tokens, there are {count}"
            if entry.about.get("tokenizer_sha256", index.tokenizer_sha256) != index.tokenizer_sha256:
                return f"{where}: its .json names another tokenizer"
    if entries != len(documents):
        return f"{entries} documents in the tar, the index says {len(documents)}"
    return None
