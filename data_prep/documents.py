"""Documents out of text, jsonl and parquet files, in a fixed order; what cannot be read becomes a Reject."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: its first n multiples lie evenly in 2**64, whatever n is

Place = tuple[int, int]  # number of the file in the corpus, and of the document (or reject) in the file


@dataclass(frozen=True)
class Document:
    """One long text. `source` is the file it came from, `id` names it within the corpus."""

    id: str
    source: str
    text: str


@dataclass(frozen=True)
class Reject:
    """A document (or a file, from `id` on) that was left out.

    `reason` is one of empty, not_utf8, bad_json, no_text_field, text_not_a_string, unreadable.
    """

    id: str
    source: str
    reason: str
    detail: str


@dataclass(frozen=True)
class InputFile:
    """A file to read; `name` is its path below the given input, which does not depend on where that lies."""

    path: Path
    name: str

    @property
    def format(self) -> tuple[str, str | None]:
        """Suffix (.jsonl, .parquet, else text), and how it is compressed."""
        suffixes = self.path.suffixes
        compression = COMPRESSION.get(suffixes.pop()) if suffixes[-1:] and suffixes[-1] in COMPRESSION else None
        return suffixes[-1] if suffixes else "", compression


def find_inputs(inputs: list[Path], output: Path) -> list[InputFile]:
    """The files named, and all files below the directories named (hidden ones left out), sorted by path.

    Raises FileNotFoundError for an input that does not exist, ValueError if there is no file at all, or if
    `output` lies in an input, where the next run would read it.
    """
    files = []
    for given in inputs:
        root = given.resolve()
        if output.resolve().is_relative_to(root):
            raise ValueError(f"output {output} lies in the input {given}")
        if root.is_dir():
            below = sorted(path for path in root.rglob("*") if path.is_file())
            relative = [path.relative_to(root) for path in below]
            files += [
                InputFile(path, str(root.name / part))
                for path, part in zip(below, relative, strict=True)
                if not any(name.startswith(".") or name == "__pycache__" for name in part.parts)
            ]
        elif root.is_file():
            files.append(InputFile(root, root.name))
        elif root.exists():
            raise ValueError(f"input {given} is neither a file nor a directory")
        else:
            raise FileNotFoundError(f"input {given} does not exist")
    if not files:
        raise ValueError(f"no files in {', '.join(map(str, inputs))}")
    return files


def fingerprint_inputs(files: list[InputFile]) -> str:
    """Hex sha256 over names, sizes and modification times: tells whether the inputs are those of a past run."""
    stats = [(file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.path.stat()]]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


class DocumentReader:
    """Iterates over the documents and rejects of `files`; `bytes_read` of `bytes_total` tells how far it is.

    Reads only what falls to `task`, one of `tasks` numbered from 0. Each document falls to one task, by file names
    and sizes alone, and all have about the same bytes. A file falls to one task whole; but one of many documents
    that is far larger than a task's share is dealt out document by document, and all who get any read through it.
    """

    def __init__(self, files: list[InputFile], text_field: str, id_field: str, task: int = 0, tasks: int = 1) -> None:
        self.files = files
        self.text_field = text_field
        self.id_field = id_field
        self.task = task
        self.tasks = tasks
        self._sizes = [file.path.stat().st_size for file in files]
        # where each file begins in the whole; an empty one takes a byte too
        self._starts = list(accumulate((size + 1 for size in self._sizes), initial=0))
        share = self._starts[-1] / tasks
        self._dealt_out = {
            number
            for number, file in enumerate(files)
            if file.format[0] in (".jsonl", ".parquet") and self._sizes[number] > 1.5 * share
        }
        self._to_read = [number for number in range(len(files)) if task in self._readers(number)]
        self.bytes_total = sum(self._sizes[number] for number in self._to_read)
        self._finished = 0
        self._raw: BufferedReader | None = None

    @property
    def bytes_read(self) -> int:
        return self._finished + (self._raw.tell() if self._raw else 0)

    def __iter__(self) -> Iterator[Document | Reject]:
        return (item for _, item in self.placed())

    def placed(self) -> Iterator[tuple[Place, Document | Reject]]:
        """The same with their places, which ascend, and are those that a single task would find."""
        for number in self._to_read:
            start, end = self._starts[number : number + 2]
            for record, item in enumerate(self._items(self.files[number])):
                somewhere = start + ((end - start) * ((record + 1) * GOLDEN % 2**64) >> 64)
                if number not in self._dealt_out or self._task_at(somewhere) == self.task:
                    yield (number, record), item
            self._finished += self._sizes[number]

    def _task_at(self, position: int) -> int:
        return position * self.tasks // self._starts[-1]

    def _readers(self, number: int) -> range:
        """The tasks that read a file."""
        start, end = self._starts[number : number + 2]
        if number in self._dealt_out:
            return range(self._task_at(start), self._task_at(end - 1) + 1)
        middle = self._task_at((start + end) // 2)
        return range(middle, middle + 1)

    def _items(self, file: InputFile) -> Iterator[Document | Reject]:
        kind, compression = file.format
        try:
            with open(file.path, "rb") as self._raw:
                if kind == ".parquet":
                    yield from self._parquet(file, self._raw)
                elif kind == ".jsonl":
                    yield from self._jsonl(file, self._stream(self._raw, compression))
                else:
                    yield self._document(file.name, file.name, self._stream(self._raw, compression).read())
        except (OSError, pyarrow.ArrowException) as error:  # pyarrow's I/O errors are OSErrors
            yield Reject(file.name, file.name, "unreadable", str(error))
        finally:
            self._raw = None

    @staticmethod
    def _stream(raw: BufferedReader, compression: str | None) -> BufferedReader:
        # pyarrow rather than gzip and zstandard: it notices a truncated file of either kind
        return BufferedReader(pyarrow.CompressedInputStream(raw, compression)) if compression else raw

    def _document(self, id: str, source: str, text: Any) -> Document | Reject:
        try:
            if isinstance(text, bytes):
                text = text.decode("utf-8-sig")  # a byte order mark is no text
            if not isinstance(text, str):
                return Reject(id, source, "text_not_a_string", f"it is {type(text).__name__}")
            text.encode()  # JSON can smuggle in half of a surrogate pair
        except UnicodeError as error:
            return Reject(id, source, "not_utf8", str(error))
        return Document(id, source, text) if text.strip() else Reject(id, source, "empty", "")

    def _record(self, record: dict[str, Any], place: str, source: str) -> Document | Reject:
        id = record.get(self.id_field)
        name = place if id is None else str(id)
        if self.text_field not in record:
            found = ", ".join(sorted(record)[:10]) or "nothing"
            return Reject(name, source, "no_text_field", f"expected {self.text_field!r}, found {found}")
        return self._document(name, source, record[self.text_field])

    def _jsonl(self, file: InputFile, stream: BufferedReader) -> Iterator[Document | Reject]:
        for number, line in enumerate(stream, start=1):
            place = f"{file.name}:{number}"
            if not line.strip():
                continue  # a blank line is no record
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                yield Reject(place, file.name, "not_utf8", str(error))
            except (ValueError, RecursionError) as error:
                yield Reject(place, file.name, "bad_json", str(error))
            else:
                if isinstance(record, dict):
                    yield self._record(record, place, file.name)
                else:
                    yield Reject(place, file.name, "bad_json", f"a {type(record).__name__}, not an object")

    def _parquet(self, file: InputFile, raw: BufferedReader) -> Iterator[Document | Reject]:
        table = pyarrow.parquet.ParquetFile(raw)
        columns = [name for name in (self.text_field, self.id_field) if name in table.schema_arrow.names]
        if self.text_field not in columns:
            found = ", ".join(table.schema_arrow.names[:10])
            detail = f"expected column {self.text_field!r}, found {found}"
            yield Reject(file.name, file.name, "no_text_field", detail)
            return
        row = 0
        for batch in table.iter_batches(batch_size=64, columns=columns):
            for i in range(batch.num_rows):
                row += 1
                try:
                    record = {name: batch.column(name)[i].as_py() for name in columns}
                except UnicodeDecodeError as error:
                    yield Reject(f"{file.name}:{row}", file.name, "not_utf8", str(error))
                else:
                    yield self._record(record, f"{file.name}:{row}", file.name)
