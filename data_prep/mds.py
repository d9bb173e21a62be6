"""Reads columns of integers of MosaicML's MDS datasets, without `mosaicml-streaming` and all that it depends on.

A directory has index.json, which lists the shards. A shard holds the number of its rows and their offsets (uint32),
and in each row the sizes of the columns that have no fixed size (uint32), then the columns.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from infini_train.files import plain_name

INDEX = "index.json"
RANGES = "indices"  # column of ProLong and others: start and end of each document that a row was packed of
SHAPE_DTYPES = ("<u1", "<u2", "<u4", "<u8")
VALUE_DTYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}  # by their code
COMPRESSIONS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2"}


def is_mds(directory: Path) -> bool:
    """Tell whether a directory is an MDS dataset."""
    try:
        shards = json.loads((directory / INDEX).read_bytes())["shards"]
        return bool(shards) and shards[0]["format"] == "mds"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False


def mds_files(directory: Path) -> list[Path]:
    """Return the files of all shards, compressed only where nothing else is there. Raises FileNotFoundError."""
    return [_file(directory, shard) for shard in _shards(directory)]


def read_mds(
    directory: Path, name: str, column: str | None, defaults: Sequence[str], dtype: str | None
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Iterate over the documents of a dataset: a row, or what RANGES says to be one of those in a row.

    Args:
        directory: the dataset.
        name: what messages call it.
        column: the column of the ids, None for the first of `defaults` that is there.
        defaults: the usual names of it.
        dtype: type of ids in a column of bytes, None for int64 as llm-foundry writes them.

    Returns:
        An iterator over (shard and row for messages, number of the first id in the row, ids).

    Raises:
        FileNotFoundError: a shard is lost.
        ValueError: a shard is damaged, or the column is not one of integers.
    """
    for shard in _shards(directory):
        path = _file(directory, shard)
        where = f"{name}/{path.name}"
        content = _content(path, shard, where)
        names, encodings, sizes = (shard[f"column_{what}"] for what in ("names", "encodings", "sizes"))
        wanted = [column] if column else list(defaults)
        ids_column = next((one for one in wanted if one in names), None)
        if ids_column is None:
            raise ValueError(
                f"{where}: found columns {', '.join(names)}, expected {' or '.join(wanted)}: --tokens_field names "
                "the column of the ids"
            )
        count = int(content[:4].view("<u4")[0]) if len(content) >= 4 else 0
        if len(content) < 8 + 4 * count:
            raise ValueError(f"{where}: found {len(content):,} bytes, too few for the offsets of {count:,} rows")
        offsets = content[4 : 8 + 4 * count].view("<u4").tolist()
        for row in range(count):
            place = f"{where}, row {row + 1:,}"
            data = content[offsets[row] : offsets[row + 1]]
            try:
                values = _columns(data, sizes)
                ids = _array(values[names.index(ids_column)], encodings[names.index(ids_column)], dtype)
                ranges = [[0, len(ids)]]
                if RANGES in names:
                    found = _array(values[names.index(RANGES)], encodings[names.index(RANGES)], None)
                    ranges = found.reshape(-1, 2).tolist()
                if any(not 0 <= start <= end <= len(ids) for start, end in ranges):
                    raise ValueError(f"column {RANGES} has ranges outside its {len(ids):,} ids")
            except (ValueError, KeyError, IndexError) as error:
                raise ValueError(f"{place}: it cannot be read: {error}") from None
            for start, end in ranges:
                yield place, start, ids[start:end]


def _shards(directory: Path) -> list[dict[str, Any]]:
    """Return the shards of an index. Raises ValueError if it lacks what is needed of one."""
    shards = json.loads((directory / INDEX).read_bytes())["shards"]
    for number, shard in enumerate(shards):
        try:
            names, encodings, sizes = (shard[f"column_{what}"] for what in ("names", "encodings", "sizes"))
            stored = [shard["raw_data"], shard.get("zip_data") or shard["raw_data"]]
            fits = (
                len(names) == len(encodings) == len(sizes)
                and all(isinstance(one, str) for one in [*names, *encodings, *(file["basename"] for file in stored)])
                and all(size is None or isinstance(size, int) for size in sizes)
                and isinstance(stored[0]["bytes"], int)
            )
        except (KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise ValueError(
                f"{directory / INDEX}, shard {number}: expected names, encodings and sizes of its columns, and names "
                "of its files"
            )
    return shards


def _file(directory: Path, shard: dict[str, Any]) -> Path:
    names = [shard[which]["basename"] for which in ("raw_data", "zip_data") if shard.get(which)]
    paths = [directory / plain_name(name, directory / INDEX) for name in names]
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(f"{paths[0]} does not exist: the dataset has lost a shard that its {INDEX} lists")


def _content(path: Path, shard: dict[str, Any], where: str) -> np.ndarray:
    """Return the uncompressed bytes of a shard."""
    raw = shard["raw_data"]
    if path.name == raw["basename"]:
        content: np.ndarray = np.memmap(path, np.uint8, "r")
    else:
        kind = str(shard.get("compression")).split(":")[0]
        if kind not in COMPRESSIONS:
            raise ValueError(
                f"{where}: found the compression {kind}, expected {', '.join(COMPRESSIONS)}: decompress it first"
            )
        try:
            with pyarrow.CompressedInputStream(path, COMPRESSIONS[kind]) as stream:
                content = np.frombuffer(stream.read(), np.uint8)
        except OSError as error:
            raise ValueError(f"{where}: {error}") from None
    if len(content) != raw["bytes"]:
        raise ValueError(f"{where}: found {len(content):,} bytes, its {INDEX} says {raw['bytes']:,}")
    return content


def _columns(data: np.ndarray, sizes: list[int | None]) -> list[np.ndarray]:
    """Cut the bytes of a row into those of its columns."""
    open_sizes = sizes.count(None)
    given = iter(data[: 4 * open_sizes].view("<u4").tolist())
    ends = np.cumsum([4 * open_sizes, *(next(given) if size is None else size for size in sizes)]).tolist()
    if ends[-1] != len(data):
        raise ValueError(f"{len(data):,} bytes, expected {ends[-1]:,}")
    return [data[start:end] for start, end in pairwise(ends)]


def _array(data: np.ndarray, encoding: str, dtype: str | None) -> np.ndarray:
    """Decode a column of integers: `bytes`, `ndarray`, `ndarray:DTYPE` or `ndarray:DTYPE:SHAPE`."""
    kind, *given = encoding.split(":")
    if kind == "bytes":
        return data.view(np.dtype(dtype or "int64").newbyteorder("<"))
    if kind != "ndarray":
        raise ValueError(f"its column has the encoding {encoding}, expected ndarray or bytes")
    if given and given[0]:
        found = np.dtype(given[0]).newbyteorder("<")
    else:
        found, data = np.dtype(VALUE_DTYPES[int(data[0])]), data[1:]
    if found.kind not in "iu":
        raise ValueError(f"its column holds {found.name}, expected integers")
    if len(given) < 2:
        dimensions, size = divmod(int(data[0]), 4)
        data = data[1 + dimensions * np.dtype(SHAPE_DTYPES[size]).itemsize :]
    return data.view(found)
