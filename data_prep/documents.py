"""Reads documents from text, jsonl, parquet and tar files in a fixed order; what cannot be read becomes a Reject."""

import errno
import hashlib
import json
import os
import stat
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BufferedReader
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
MULTI_DOCUMENT = (".jsonl", ".parquet", ".tar")  # formats of files that hold many documents
MAX_BYTES = 1 << 30  # of a document, because a whole document and its tokens are held in memory
# 2**64 divided by the golden ratio. The first n multiples of it, modulo 2**64, are spread evenly for any n.
GOLDEN_RATIO = 0x9E3779B97F4A7C15

DocumentPosition = tuple[int, int]  # number of the file in the corpus, number of the document or reject in the file
UnicodeForm = Literal["NFC", "NFKC", "none"]


@dataclass(frozen=True)
class Document:
    """One text of the corpus."""

    id: str  # unique within the corpus
    source: str  # name of the file that holds it
    text: str
    group: str | None = None  # documents of one group are joined (see `join` of DocumentReader)


@dataclass(frozen=True)
class Reject:
    """A document that is left out, or the rest of a file that cannot be read.

    `reason` is one of empty, not_utf8, nul_bytes, bad_json, no_text_field, text_not_a_string, too_large, unreadable
    and symlink_loop, which the reader finds, or duplicate, duplicate_id and too_short, which planning finds.
    """

    id: str
    source: str
    reason: str
    detail: str


@dataclass(frozen=True)
class InputFile:
    """A file to read."""

    path: Path
    name: str  # path relative to the parent of the given input, so that it does not depend on where the input lies
    size: int
    mtime_ns: int
    wrong: tuple[str, str] | None = None  # reason and detail of a Reject, if the file is known to be unreadable

    @property
    def format(self) -> tuple[str, str | None]:
        """The suffix (.jsonl, .parquet, .tar, anything else for text) and the compression, None if there is none."""
        suffixes = self.path.suffixes
        compression = COMPRESSION.get(suffixes.pop()) if suffixes[-1:] and suffixes[-1] in COMPRESSION else None
        return suffixes[-1] if suffixes else "", compression


def find_inputs(inputs: list[Path], output: Path) -> list[InputFile]:
    """List the given files, and all files below the given directories except hidden ones, sorted by path.

    Symbolic links are followed. A link that is broken or part of a loop becomes a file that cannot be read.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: there are no files, or `output` lies in an input, where the next run would read it.
    """
    files: list[InputFile] = []
    for given in inputs:
        root = given.resolve()
        if output.resolve().is_relative_to(root):
            raise ValueError(f"output {output} lies in the input {given}")
        if root.is_dir():
            below = sorted(_below(root, Path(root.name), ()), key=lambda file: file.path)
            files += below
        elif root.is_file():
            files.append(_input_file(root, root.name, root.stat()))
        elif root.exists():
            raise ValueError(f"input {given} is neither a file nor a directory")
        else:
            raise FileNotFoundError(f"input {given} does not exist")
    if not files:
        raise ValueError(f"no files in {', '.join(map(str, inputs))}")
    return files


def _input_file(path: Path, name: str, status: os.stat_result) -> InputFile:
    return InputFile(path, name, status.st_size, status.st_mtime_ns)


def _below(directory: Path, name: Path, above: tuple[tuple[int, int], ...]) -> Iterator[InputFile]:
    """Find all files below a directory; `above` holds device and inode of its parents, to detect link loops."""
    try:
        status = directory.stat()
        if (status.st_dev, status.st_ino) in above:
            yield InputFile(directory, str(name), 0, 0, ("symlink_loop", f"leads to {directory.resolve()}"))
            return
        entries = list(os.scandir(directory))
    except OSError as error:
        yield InputFile(directory, str(name), 0, 0, ("unreadable", str(error)))
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        path, below = directory / entry.name, name / entry.name
        try:
            found = path.stat()
        except OSError as error:
            reason = "symlink_loop" if error.errno == errno.ELOOP else "unreadable"
            yield InputFile(path, str(below), 0, 0, (reason, str(error)))
            continue
        if stat.S_ISDIR(found.st_mode):
            yield from _below(path, below, (*above, (status.st_dev, status.st_ino)))
        elif stat.S_ISREG(found.st_mode):
            yield _input_file(path, str(below), found)


def fingerprint_inputs(files: list[InputFile]) -> str:
    """Return a hexadecimal sha256 of names, sizes and modification times, which identifies the inputs of a run."""
    stats = [(file.name, file.size, file.mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def inputs_to_json(files: list[InputFile]) -> bytes:
    """Serialise files, one line of JSON for each; `load_inputs` reads them back."""
    return b"".join(json.dumps(asdict(file) | {"path": str(file.path)}).encode() + b"\n" for file in files)


def load_inputs(path: Path) -> list[InputFile]:
    """Read a file that `inputs_to_json` wrote."""
    with open(path, "rb") as f:
        lines = [json.loads(line) for line in f]
    return [
        InputFile(**line | {"path": Path(line["path"]), "wrong": line["wrong"] and tuple(line["wrong"])})
        for line in lines
    ]


def group_of_path(source: str, join: str) -> str:
    """Return a file's group for `join="directory"` (its directory) or "directory:N" (the first N below the input)."""
    parts = Path(source).parts[:-1]
    depth = join.partition(":")[2]
    return "/".join(parts[: int(depth) + 1] if depth else parts)


class DocumentReader:
    """Iterates over one task's share of the documents and rejects of `files`.

    Each document belongs to exactly one task. The assignment depends only on the order and sizes of the files, and
    gives all tasks about the same number of bytes. Usually one task reads a whole file. A file of many documents that
    is far larger than a task's share is split among several tasks: each of them reads all of it and keeps its own
    documents. `bytes_read` of `bytes_total` bytes measures the progress.

    Args:
        files: all files of the corpus, from `find_inputs`.
        text_field: field or column that holds the text.
        id_field: field or column that holds the id; without it, file name and line or row number are the id.
        task: number of this task, from 0.
        tasks: number of tasks.
        unicode_form: normalisation of the text.
        join: what documents of one group share: "directory", "directory:N" or the name of a field.
    """

    def __init__(
        self,
        files: list[InputFile],
        text_field: str,
        id_field: str,
        task: int = 0,
        tasks: int = 1,
        *,
        unicode_form: UnicodeForm = "NFC",
        join: str | None = None,
    ) -> None:
        self.files = files
        self.text_field = text_field
        self.id_field = id_field
        self.task = task
        self.tasks = tasks
        self.unicode_form = unicode_form
        self.join = join
        self._sizes = [file.size for file in files]
        # The start of each file in the concatenation of all; one extra byte gives empty files a place of their own.
        self._starts = list(accumulate((size + 1 for size in self._sizes), initial=0))
        share = self._starts[-1] / tasks
        self._split_files = {
            number
            for number, file in enumerate(files)
            if file.format[0] in MULTI_DOCUMENT and self._sizes[number] > 1.5 * share
        }
        self._to_read = [number for number in range(len(files)) if task in self._readers(number)]
        self.bytes_total = sum(self._sizes[number] for number in self._to_read)
        self._finished = 0
        self._raw: BufferedReader | None = None

    @property
    def bytes_read(self) -> int:
        return self._finished + (self._raw.tell() if self._raw else 0)

    def __iter__(self) -> Iterator[Document | Reject]:
        return (item for _, item in self.with_positions())

    def with_positions(self) -> Iterator[tuple[DocumentPosition, Document | Reject]]:
        """Iterate over (position, document or reject); positions ascend and do not depend on the number of tasks."""
        for number in self._to_read:
            start, end = self._starts[number : number + 2]
            for record, item in enumerate(self._items(self.files[number])):
                # A record's own offset is unknown in compressed files, so the records of a file are spread evenly
                # over its bytes, and a record belongs to the task whose share contains the byte it is assigned.
                byte = start + ((end - start) * ((record + 1) * GOLDEN_RATIO % 2**64) >> 64)
                if number not in self._split_files or self._task_at(byte) == self.task:
                    yield (number, record), item
            self._finished += self._sizes[number]

    def _task_at(self, position: int) -> int:
        """Return the task whose share contains a byte of the concatenation of all files."""
        return position * self.tasks // self._starts[-1]

    def _readers(self, number: int) -> range:
        """Return the tasks that read a file."""
        start, end = self._starts[number : number + 2]
        if number in self._split_files:
            return range(self._task_at(start), self._task_at(end - 1) + 1)
        middle = self._task_at((start + end) // 2)
        return range(middle, middle + 1)

    def _items(self, file: InputFile) -> Iterator[Document | Reject]:
        if file.wrong:
            yield Reject(file.name, file.name, *file.wrong)
            return
        kind, compression = file.format
        try:
            with open(file.path, "rb") as self._raw:
                # Tasks divide the work by the sizes that were found at first, so files must not change meanwhile.
                if (found := os.fstat(self._raw.fileno()).st_size) != file.size:
                    raise RuntimeError(f"{file.path} has changed: found {found:,} bytes, expected {file.size:,}")
                if kind == ".parquet":
                    yield from self._parquet(file, self._raw)
                elif kind == ".jsonl":
                    yield from self._jsonl(file, self._stream(self._raw, compression))
                elif kind == ".tar":
                    yield from self._tar(file, self._stream(self._raw, compression))
                else:
                    content = self._stream(self._raw, compression).read(MAX_BYTES + 1)
                    yield self._document(file.name, file.name, content, None)
        except (OSError, EOFError, pyarrow.ArrowException) as error:  # pyarrow's I/O errors are OSErrors
            yield Reject(file.name, file.name, "unreadable", str(error))
        finally:
            self._raw = None

    @staticmethod
    def _stream(raw: BufferedReader, compression: str | None) -> BufferedReader:
        # pyarrow raises an error for truncated gzip and zstandard files alike.
        return BufferedReader(pyarrow.CompressedInputStream(raw, compression)) if compression else raw

    def _document(self, id: str, source: str, text: Any, group: Any) -> Document | Reject:
        try:
            if isinstance(text, bytes):
                if len(text) > MAX_BYTES:
                    return Reject(id, source, "too_large", f"more than {MAX_BYTES:,} bytes")
                text = text.decode("utf-8-sig")  # drops a byte order mark
            if not isinstance(text, str):
                return Reject(id, source, "text_not_a_string", f"it is {type(text).__name__}")
            text.encode()  # fails for half of a surrogate pair, which JSON escapes can contain
        except UnicodeError as error:
            return Reject(id, source, "not_utf8", str(error))
        if "\0" in text:
            return Reject(id, source, "nul_bytes", f"first at character {text.index(chr(0)):,}: probably not text")
        if not text.strip():
            return Reject(id, source, "empty", "")
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if self.unicode_form != "none":
            text = unicodedata.normalize(self.unicode_form, text)
        if self.join and self.join.split(":")[0] == "directory":
            group = group_of_path(source, self.join)
        return Document(id, source, text, None if group is None else str(group))

    def _record(self, record: dict[str, Any], location: str, source: str) -> Document | Reject:
        id = record.get(self.id_field)
        name = location if id is None else str(id)
        if self.text_field not in record:
            found = ", ".join(sorted(record)[:10]) or "nothing"
            return Reject(name, source, "no_text_field", f"expected {self.text_field!r}, found {found}")
        return self._document(name, source, record[self.text_field], record.get(self.join or ""))

    def _json(self, content: bytes, location: str, source: str) -> Document | Reject:
        try:
            record = json.loads(content)
        except UnicodeDecodeError as error:
            return Reject(location, source, "not_utf8", str(error))
        except (ValueError, RecursionError) as error:
            return Reject(location, source, "bad_json", str(error))
        if not isinstance(record, dict):
            return Reject(location, source, "bad_json", f"a {type(record).__name__}, not an object")
        return self._record(record, location, source)

    def _jsonl(self, file: InputFile, stream: BufferedReader) -> Iterator[Document | Reject]:
        number = 0
        while line := stream.readline(MAX_BYTES + 1):
            number += 1
            location = f"{file.name}:{number}"
            if len(line) > MAX_BYTES:
                yield Reject(location, file.name, "too_large", f"a line of more than {MAX_BYTES:,} bytes")
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_BYTES)
            elif line.strip():  # blank lines are skipped
                yield self._json(line, location, file.name)

    def _tar(self, file: InputFile, stream: BufferedReader) -> Iterator[Document | Reject]:
        """Read a webdataset: the text of a sample is KEY.txt or, without it, the text field of KEY.json."""
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for key, members in groupby(_texts_of(tar), itemgetter(0)):
                    name, of_kind = f"{file.name}:{key}", {kind: content for _, kind, content in members}
                    kind = "txt" if "txt" in of_kind else "json"
                    if of_kind[kind] is None:
                        yield Reject(name, file.name, "too_large", f"more than {MAX_BYTES:,} bytes")
                    elif kind == "txt":
                        yield self._document(name, file.name, of_kind[kind], None)
                    else:
                        yield self._json(of_kind[kind] or b"", name, file.name)
        except tarfile.TarError as error:
            yield Reject(file.name, file.name, "unreadable", str(error))

    def _parquet(self, file: InputFile, raw: BufferedReader) -> Iterator[Document | Reject]:
        table = pyarrow.parquet.ParquetFile(raw)
        wanted = (self.text_field, self.id_field, self.join)
        columns = [name for name in table.schema_arrow.names if name in wanted]
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


def _texts_of(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield key, kind (txt or json) and content (None if it is too large) of a webdataset's members."""
    for member in tar:
        directory, name = os.path.split(member.name)
        key, _, kind = name.partition(".")
        if member.isfile() and kind in ("txt", "json"):
            content = tar.extractfile(member)
            assert content is not None, "a regular file"
            yield os.path.join(directory, key), kind, content.read() if member.size <= MAX_BYTES else None
