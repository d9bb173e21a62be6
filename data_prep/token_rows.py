"""Reads the ids of files that other programs wrote, document by document where their format says where one ends."""

import csv
import gzip
import tokenize
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from data_prep.mds import read_mds
from data_prep.token_files import (
    DATATROVE,
    LLM_C,
    LLM_C_DTYPES,
    MDS,
    MEGATRON,
    MEGATRON_MAGIC,
    NUMPY,
    PARQUET,
    RAW,
    TokenFile,
)

COLUMNS = ("input_ids", "tokens")  # that hold the ids, if the user names none
# By its code, the type of the ids in Megatron's index.
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
MEGATRON_HEADER = np.dtype("S9,<u8,u1,<u8,<u8")  # magic, version, code of the type, numbers of sequences and borders
LLM_C_HEADER = 256 * 4  # bytes
GUESSED_BYTES = 1 << 16  # of a file of ids alone, from which their size is guessed
PARQUET_ROWS = 16  # that are read at once


class Ids(NamedTuple):
    """Consecutive ids of one file."""

    ids: np.ndarray  # integers of any type, mapped from the file or in memory
    place: str  # the file and, if it has rows, the row
    first: int = 0  # number of the first of them in the file or row
    byte: int | None = None  # offset of the first of them in the file, None if the file is not a plain array

    def where(self, position: int) -> str:
        """Return where the user finds an id: the file, the number of the id, and its offset."""
        at = "" if self.byte is None else f" (byte {self.byte + position * self.ids.itemsize:,})"
        return f"{self.place}, token {self.first + position:,}{at}"

    def part(self, start: int, end: int) -> "Ids":
        """Return the ids from position `start` to `end`."""
        byte = None if self.byte is None else self.byte + start * self.ids.itemsize
        return Ids(self.ids[start:end], self.place, self.first + start, byte)


@dataclass(frozen=True)
class Reading:
    """How files are read whose format leaves it open.

    Attributes:
        vocab_size: of the tokenizer, by which the size of raw ids is guessed.
        dtype: type of raw ids and of MDS columns of bytes, None to guess it.
        column: column of the ids in Parquet files and MDS, None for one of COLUMNS.
    """

    vocab_size: int
    dtype: str | None = None
    column: str | None = None


def read_rows(file: TokenFile, reading: Reading) -> Iterator[Ids]:
    """Iterate over the documents of a file with borders, or return all ids of one without.

    Raises:
        ValueError: the file is damaged, or does not hold ids.
    """
    readers: dict[str, Callable[[TokenFile, Reading], Iterator[Ids]]] = {
        MEGATRON: _megatron,
        LLM_C: _llm_c,
        RAW: _raw,
        NUMPY: _numpy,
        DATATROVE: _raw,
        MDS: _mds,
        PARQUET: _parquet,
    }
    return readers[file.kind](file, reading)


def _mapped(file: TokenFile, dtype: np.dtype | str, offset: int = 0) -> np.ndarray:
    """Map a file's ids, from a byte offset on."""
    dtype = np.dtype(dtype)
    size = file.path.stat().st_size - offset
    if size <= 0:
        raise ValueError(f"{file.name}: found no ids, an empty file")
    if size % dtype.itemsize:
        raise ValueError(
            f"{file.name}: found {size:,} bytes of ids, expected a multiple of {dtype.itemsize} ({dtype.name})"
        )
    return np.memmap(file.path, dtype, "r", offset)


def _raw(file: TokenFile, reading: Reading) -> Iterator[Ids]:
    """Read ids without a header, as nanoGPT, Dolma and datatrove write them."""
    borders = _borders(file)
    dtype = reading.dtype
    if file.kind == DATATROVE and len(borders) and borders[-1]:
        dtype = {2: "uint16", 4: "uint32"}.get(file.path.stat().st_size // int(borders[-1]))
    ids = _mapped(file, np.dtype(dtype).newbyteorder("<") if dtype else _guessed_dtype(file.path, reading.vocab_size))
    whole = Ids(ids, file.name, 0, 0)
    if file.index is None:
        yield whole
        return
    if not len(borders) or borders[0] or borders[-1] != len(ids) or np.any(np.diff(borders) < 0):
        end = f"{borders[-1]:,}" if len(borders) else "none"
        raise ValueError(
            f"{file.index.name}: its documents end at token {end}, expected ends that ascend to the {len(ids):,} "
            f"tokens ({ids.dtype.name}) of {file.name}"
        )
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        yield whole.part(start, end)


def _guessed_dtype(path: Path, vocab_size: int) -> str:
    """Return "<u4" if the ids are in the vocabulary when they are read so: of 2-byte ids, every second would be 0."""
    head = np.fromfile(path, np.uint8, GUESSED_BYTES)
    pairs = head[: len(head) // 4 * 4].view("<u4")
    return "<u4" if len(pairs) and path.stat().st_size % 4 == 0 and pairs.max() < vocab_size else "<u2"


def _borders(file: TokenFile) -> np.ndarray:
    """Return the numbers of the tokens where documents begin, and that of all tokens, from a file's index."""
    if file.index is None:
        return np.zeros(0, np.int64)
    if file.kind == DATATROVE:
        if (size := file.index.stat().st_size) % 8:
            raise ValueError(f"{file.index.name}: found {size:,} bytes, expected 8 for each document")
        return np.concatenate([[0], np.fromfile(file.index, "<u8").astype(np.int64)])
    try:  # Dolma's, with start and end in the first columns
        with gzip.open(file.index, "rt", newline="") as f:
            rows = [(int(start), int(end)) for start, end, *_ in csv.reader(f)]
    except (ValueError, OSError, EOFError, zlib.error, csv.Error) as error:
        raise ValueError(f"{file.index.name}: expected rows of start, end, id, src, loc: {error}") from None
    starts, ends = np.array(rows, np.int64).reshape(-1, 2).T
    if np.any(starts[1:] != ends[:-1]) or (len(starts) and starts[0]):
        raise ValueError(f"{file.index.name}: expected documents that follow one another")
    return np.concatenate([[0], ends])


def _megatron(file: TokenFile, reading: Reading) -> Iterator[Ids]:
    assert file.index
    content = np.fromfile(file.index, np.uint8)
    if len(content) < MEGATRON_HEADER.itemsize or not content.tobytes()[:9] == MEGATRON_MAGIC:
        raise ValueError(f"{file.index.name}: found no Megatron index, expected one that begins with MMIDIDX")
    _, version, code, rows, count = content[: MEGATRON_HEADER.itemsize].view(MEGATRON_HEADER)[0].tolist()
    dtype = MEGATRON_DTYPES.get(code)
    expected = MEGATRON_HEADER.itemsize + 12 * rows + 8 * count
    if version != 1 or dtype is None:
        raise ValueError(
            f"{file.index.name}: found version {version} and code {code} of the type of ids, "
            f"expected version 1 and one of {', '.join(map(str, MEGATRON_DTYPES))}"
        )
    if len(content) not in (expected, expected + rows):  # the latter with a mode for each row, of multimodal data
        raise ValueError(f"{file.index.name}: found {len(content):,} bytes, expected {expected:,}")
    place = MEGATRON_HEADER.itemsize
    lengths = content[place : place + 4 * rows].view("<i4").astype(np.int64)
    offsets = content[place + 4 * rows : place + 12 * rows].view("<i8")
    borders = content[place + 12 * rows : expected].view("<i8")
    ids = _mapped(file, dtype)
    starts = offsets // ids.itemsize
    if np.any(offsets % ids.itemsize) or np.any(starts[1:] != (starts + lengths)[:-1]) or (rows and starts[0]):
        raise ValueError(f"{file.index.name}: its sequences do not follow one another in {file.name}")
    ends = np.concatenate([starts, [lengths.sum()]])
    if ends[-1] != len(ids):
        raise ValueError(f"{file.name}: found {len(ids):,} tokens, its index says {ends[-1]:,}")
    if not count or borders[0] or borders[-1] != rows or np.any(np.diff(borders) < 0):
        raise ValueError(f"{file.index.name}: its documents do not ascend to its {rows:,} sequences")
    whole = Ids(ids, file.name, 0, 0)
    for start, end in zip(ends[borders[:-1]].tolist(), ends[borders[1:]].tolist(), strict=True):
        yield whole.part(start, end)


def _llm_c(file: TokenFile, reading: Reading) -> Iterator[Ids]:
    header = np.fromfile(file.path, "<i4", LLM_C_HEADER // 4)
    if len(header) < LLM_C_HEADER // 4:
        raise ValueError(f"{file.name}: found a header of {header.nbytes} bytes, expected {LLM_C_HEADER:,}")
    ids = _mapped(file, LLM_C_DTYPES[int(header[0])], LLM_C_HEADER)
    if len(ids) != header[2]:
        raise ValueError(f"{file.name}: found {len(ids):,} tokens, its header says {header[2]:,}")
    yield Ids(ids, file.name, 0, LLM_C_HEADER)


def _numpy(file: TokenFile, reading: Reading) -> Iterator[Ids]:
    try:
        ids = np.load(file.path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:  # numpy parses the header as Python
        raise ValueError(f"{file.name}: {error}") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{file.name}: found an array {list(ids.shape)} of {ids.dtype}, expected one row of integers"
        )
    yield Ids(ids, file.name, 0, file.path.stat().st_size - ids.nbytes)


def _mds(file: TokenFile, reading: Reading) -> Iterator[Ids]:
    for place, first, ids in read_mds(file.path, file.name, reading.column, COLUMNS, reading.dtype):
        yield Ids(ids, place, first)


def _parquet(file: TokenFile, reading: Reading) -> Iterator[Ids]:
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        schema = table.schema_arrow
        wanted = [reading.column] if reading.column else list(COLUMNS)
        column = next((name for name in wanted if name in schema.names), None)
        if column is None:
            raise ValueError(
                f"{file.name}: found columns {', '.join(schema.names[:10])}, expected {' or '.join(wanted)}: "
                "--tokens_field names the column of the ids"
            )
        if (times := schema.names.count(column)) > 1:
            raise ValueError(f"{file.name}: found {times} columns {column}, expected one")
        kind = schema.field(column).type
        is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
        if not (is_list or pyarrow.types.is_fixed_size_list(kind)) or not pyarrow.types.is_integer(kind.value_type):
            raise ValueError(f"{file.name}: column {column} has the type {kind}, expected lists of integers")
        number = 0
        for batch in table.iter_batches(PARQUET_ROWS, columns=[column]):
            for row in batch.column(0):
                number += 1
                place = f"{file.name}, row {number:,}"
                if row.values is None or row.values.null_count:
                    raise ValueError(f"{place}: found null, expected ids")
                yield Ids(row.values.to_numpy(zero_copy_only=False), place)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file.name}: {error}") from None
