"""Finds and reads files of token ids that other programs wrote, by their kind, which is recognised by content."""

import csv
import glob
import gzip
import os
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from data_prep.mds import is_mds, mds_files, read_mds
from infini_train.data.remote import is_remote

MEGATRON, LLM_C, RAW, NUMPY, DATATROVE, MDS, PARQUET = (
    "Megatron",
    "llm.c",
    "ids alone",
    "NumPy",
    "datatrove",
    "MDS",
    "Parquet",
)
COLUMNS = ("input_ids", "tokens")  # that hold the ids, if the user names none
MEGATRON_MAGIC, NUMPY_MAGIC, PARQUET_MAGIC = b"MMIDIDX\0\0", b"\x93NUMPY", b"PAR1"
# By its code, the type of the ids in Megatron's index.
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
MEGATRON_HEADER = np.dtype("S9,<u8,u1,<u8,<u8")  # magic, version, code of the type, numbers of sequences and borders
LLM_C_HEADER = 256 * 4  # bytes
LLM_C_DTYPES = {20240520: "<u2", 20240801: "<u4"}  # by the first number of the header
LLM_C_EVALUATION = 20240522
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


@dataclass(frozen=True)
class TokenFile:
    """A file of ids, or a directory of them that is one dataset (MDS)."""

    path: Path
    name: str  # path relative to the parent of the given input
    kind: str
    index: Path | None = None  # the file beside it that says where documents end

    @property
    def has_borders(self) -> bool:
        """Whether the format says where documents begin and end; otherwise only EOS does."""
        return self.index is not None or self.kind in (MDS, PARQUET)

    @property
    def files(self) -> list[Path]:
        """All files that it consists of."""
        if self.kind == MDS:
            return mds_files(self.path)
        return [self.path] if self.index is None else [self.path, self.index]

    def rows(self, reading: Reading) -> Iterator[Ids]:
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
        return readers[self.kind](self, reading)


def find_token_files(inputs: Sequence[Path | str], output: Path) -> tuple[list[TokenFile], list[str]]:
    """List the given files, and all files of ids below the given directories except hidden ones, sorted by path.

    Args:
        inputs: files, directories and patterns of them.
        output: what the caller will make of them.

    Returns:
        The files, and the names of other files in these directories, which are not read.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: there are no such files, a given file is none, or `output` lies in an input.
    """
    found: list[TokenFile] = []
    others: list[str] = []
    for given in inputs:
        if is_remote(given):
            raise ValueError(f"inputs: found {given}, expected files on this machine: copy them here first")
        is_pattern = glob.has_magic(str(given)) and not Path(given).exists()
        paths = (
            [Path(path) for path in sorted(glob.glob(str(given), recursive=True))] if is_pattern else [Path(given)]
        )
        if not paths:
            raise FileNotFoundError(f"input {given} matches nothing")
        for path in paths:
            root = path.resolve()
            if not root.exists():
                raise FileNotFoundError(f"input {path} does not exist")
            if output.resolve().is_relative_to(root):
                raise ValueError(f"output {output} lies in the input {path}")
            if root.is_dir():
                below = _below(root)
                found += [file for file in below if isinstance(file, TokenFile)]
                others += [file for file in below if isinstance(file, str)]
            elif file := _recognised(root, root.name):
                found.append(file)
            elif not (is_pattern and _is_index(root)):
                raise ValueError(
                    f"{path}: found no file of ids that is read, expected .bin (of Megatron, llm.c or nanoGPT), "
                    ".npy, .ds, .parquet or the directory of an MDS dataset"
                )
    if not found:
        raise ValueError(f"no files of token ids in {', '.join(map(str, inputs))}")
    for path, times in Counter(file.path for file in found).items():
        if times > 1:
            raise ValueError(f"inputs: found {path} {times} times, expected it once")
    return found, others


def _below(root: Path) -> list[TokenFile | str]:
    """List the files of ids below a directory, and the names of others."""
    listed: list[TokenFile | str] = []
    for directory, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        here = Path(directory)
        label = root.name / here.relative_to(root)
        within_mds: set[Path] = set()
        if is_mds(here):
            within_mds = {here / "index.json", *mds_files(here)}
            listed.append(TokenFile(here, str(label), MDS))
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or path in within_mds or _is_index(path):
                continue
            listed.append(_recognised(path, str(label / name)) or str(label / name))
    return listed


def _is_index(path: Path) -> bool:
    """Tell whether a file belongs to a file of ids beside it."""
    name = path.name
    for suffix, of in ((".idx", ".bin"), (".csv.gz", ".npy"), (".index", ""), (".metadata", ""), (".loss", "")):
        if name.endswith(suffix) and (of or name.removesuffix(suffix).endswith(".ds")):
            return path.with_name(name.removesuffix(suffix) + of).exists()
    return False


def _recognised(path: Path, name: str) -> TokenFile | None:
    """Return what a file is, None if it holds no ids."""
    with open(path, "rb") as f:
        head = f.read(16)
    number = int.from_bytes(head[:4], "little")
    suffix = path.suffix.lower()
    if head.startswith(PARQUET_MAGIC):
        return TokenFile(path, name, PARQUET)
    if head.startswith(NUMPY_MAGIC):
        return TokenFile(path, name, NUMPY)
    if suffix == ".bin":
        if (index := path.with_suffix(".idx")).exists():
            return TokenFile(path, name, MEGATRON, index)
        if number == LLM_C_EVALUATION:
            raise ValueError(f"{name}: found llm.c's examples of an evaluation, expected its tokens for training")
        return TokenFile(path, name, LLM_C if number in LLM_C_DTYPES else RAW)
    for kind, of, beside in ((RAW, ".npy", ".csv.gz"), (DATATROVE, ".ds", ".ds.index")):
        if suffix == of:
            index = path.with_suffix(beside)
            return TokenFile(path, name, kind, index if index.exists() else None)
    return None


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
