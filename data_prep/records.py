"""Reads the texts and records that one file holds, whatever its format."""

import csv
import json
import lzma
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import SEEK_END, BytesIO, TextIOWrapper
from itertools import groupby
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet

from data_prep.fields import column_of
from data_prep.formats import (
    ARROW,
    HEAD_BYTES,
    JSON,
    JSON_LINES,
    METADATA,
    PARQUET,
    SUFFIX_COMPRESSIONS,
    TABLE,
    TAR,
    WARC,
    ZIP,
    Format,
    recognise,
    uncompressed,
)
from data_prep.summary import Summary

CHUNK = 1 << 20  # characters of JSON that are parsed at once, at least, and bytes of a text that are read at once
NEAR_END = 16  # JSON that is cut off inside a literal or an escape fails at most so many characters before the cut
DEPTH = 3  # of archives in archives
HIDDEN = {"__MACOSX", "__pycache__"}
PAGES = ("response", "resource")  # types of WARC records
BETWEEN_VALUES = re.compile(r"[\s,]*")
ARROW_FILE, ARROW_STREAM_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
# What the libraries raise for a file that is broken or cut off; pyarrow's input/output errors are OSErrors.
UNREADABLE = (
    OSError,
    EOFError,
    lzma.LZMAError,
    zlib.error,
    pyarrow.ArrowException,
    tarfile.TarError,
    zipfile.BadZipFile,
    NotImplementedError,  # of zipfile, for a compression or version that it does not know
)


class Found(NamedTuple):
    """What a file holds at one place: a record, a text with or without a record about it, or what is wrong there."""

    location: str  # name of the file and, in a file of several documents, the place in it
    record: dict[str, Any] | None = None
    text: bytes | Iterator[bytes] | None = None  # parts of a text longer than CHUNK; None: the record holds the text
    wrong: tuple[str, str] | None = None  # reason and detail of a Reject


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    size: int
    content: IO[bytes] | None  # None if it is too large

    @property
    def parts(self) -> list[str]:
        """Its name without directories, split at the dots, without the suffix of a compression."""
        parts = PurePosixPath(self.name).name.split(".")
        return parts[:-1] if len(parts) > 1 and parts[-1].lower() in SUFFIX_COMPRESSIONS else parts

    @property
    def key(self) -> str:
        """What the members of one sample of a webdataset share."""
        return str(PurePosixPath(self.name).with_name(self.parts[0]))

    @property
    def id(self) -> str:
        """Its key if it is the only text of a sample of a webdataset, else its name."""
        return self.key if self.parts[1:] in (["txt"], ["json"]) else self.name


class RecordReader:
    """Reads files.

    Args:
        text_field: path of the text in a record.
        columns: outermost fields that are needed; other columns of tables are not read.
        encoding: that of members of archives, as `recognise` takes it.
        max_bytes: of a document; a larger one is not read.
        summary: counts what is read.
    """

    def __init__(
        self, text_field: str, columns: set[str], encoding: str | None, max_bytes: int, summary: Summary
    ) -> None:
        self.text_field, self.columns, self.encoding = text_field, columns, encoding
        self.max_bytes, self.summary = max_bytes, summary

    def read(self, stream: IO[bytes], name: str, format: Format, within: str = "") -> Iterator[Found]:
        """Iterate over what a file holds.

        Args:
            stream: the file, which is seekable.
            name: its name.
            format: what it holds.
            within: the kinds of the archives that it is a member of.

        Raises:
            One of UNREADABLE, or UnicodeError: the rest of the file cannot be read.
        """
        kind = within + format.kind + (f" ({format.encoding})" if format.encoding else "")
        content = uncompressed(stream, format.layers, format.encoding)
        if format.layers and format.kind in (PARQUET, ARROW, ZIP):  # formats that are not read from front to back
            content = _seekable(content)
        if format.kind in (TAR, ZIP):
            members = _tar_members if format.kind == TAR else _zip_members
            yield from self._archive(members(content, name, self.max_bytes), name, kind + ": ")
            return
        self.summary.begin(kind)
        readers = {
            JSON_LINES: self._json_lines,
            JSON: self._json,
            TABLE: self._table,
            PARQUET: self._parquet,
            ARROW: self._arrow,
            WARC: self._warc,
            METADATA: self._metadata,
        }
        yield from readers.get(format.kind, self._text)(content, name, format)

    def _text(self, stream: IO[bytes], name: str, format: Format) -> Iterator[Found]:
        text = stream.read(CHUNK)
        self.summary.add("bytes", len(text))
        if len(text) < CHUNK:
            yield Found(name, text=text)
            return
        parts = self._parts(text, stream)
        yield Found(name, text=parts)
        with suppress(*UNREADABLE, UnicodeError):  # the task to which the text belongs reports it
            for _ in parts:  # another task counts the bytes only
                pass

    def _parts(self, first: bytes, stream: IO[bytes]) -> Iterator[bytes]:
        yield first
        while part := stream.read(CHUNK):
            self.summary.add("bytes", len(part))
            yield part

    def _metadata(self, stream: IO[bytes], name: str, format: Format) -> Iterator[Found]:
        self.summary.add("bytes", len(stream.read()))
        yield from ()

    def _json_lines(self, stream: IO[bytes], name: str, format: Format) -> Iterator[Found]:
        number = 0
        while line := stream.readline(self.max_bytes + 1):
            number += 1
            location = f"{name}:{number}"
            self.summary.add("bytes", len(line))
            if len(line) > self.max_bytes:
                yield Found(location, wrong=("too_large", f"a line of more than {self.max_bytes:,} bytes"))
                while line and not line.endswith(b"\n"):
                    line = stream.readline(self.max_bytes)
                    self.summary.add("bytes", len(line))
            elif not line.isspace():  # blank lines are skipped
                found = _parsed(line, location)
                line = b"-"  # a long line is not kept while its record is used
                yield found

    def _json(self, stream: IO[bytes], name: str, format: Format) -> Iterator[Found]:
        """Read objects of any layout, in an array or one after the other, without holding the file in memory."""
        # What is not UTF-8 becomes lone surrogates, by which the text is rejected.
        text = TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")  # type: ignore[type-var]
        decoder = json.JSONDecoder()
        buffer, position, number = "", 0, 0
        ended = in_array = False
        while True:
            between = BETWEEN_VALUES.match(buffer, position)
            assert between is not None, "it matches nothing, too"
            position, wrong = between.end(), None
            first = buffer[position : position + 1]
            if first == ("]" if in_array else "["):
                in_array, position = not in_array, position + 1
                continue
            if first:
                try:
                    value, position = decoder.raw_decode(buffer, position)
                except RecursionError as error:
                    wrong = str(error)
                except json.JSONDecodeError as error:
                    cut_off = error.msg.startswith("Unterminated string") or error.pos > len(buffer) - NEAR_END
                    if ended or not cut_off or len(buffer) - position > self.max_bytes:
                        wrong = error.msg
                else:
                    number += 1
                    yield _record(value, f"{name}:{number}")
                    continue
            elif ended:
                if not in_array:
                    return
                wrong = "the array has no end"
            if wrong:
                detail = f"{wrong}; this file is not read beyond here (--as_text NAME takes it as a text)"
                yield Found(f"{name}:{number + 1}", wrong=("bad_json", detail))
                buffer, position = "", 0
                while more := text.read(CHUNK):
                    self.summary.add("bytes", len(more.encode(errors="surrogateescape")))
                return
            more = text.read(max(CHUNK, len(buffer) - position))
            self.summary.add("bytes", len(more.encode(errors="surrogateescape")))
            buffer, position, ended = buffer[position:] + more, 0, not more

    def _table(self, stream: IO[bytes], name: str, format: Format) -> Iterator[Found]:
        csv.field_size_limit(self.max_bytes)

        def lines() -> Iterator[str]:
            for number, line in enumerate(stream):
                self.summary.add("bytes", len(line))
                yield line.decode("utf-8" if number else "utf-8-sig", "surrogateescape")

        rows = csv.reader(lines(), delimiter=format.separator, strict=True)
        header: list[str] = []
        number = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                number += 1
                yield Found(f"{name}:{number}", wrong=("bad_row", f"{error}, up to line {rows.line_num}"))
                continue
            if not row:  # a blank line
                continue
            if not header:
                header = row
                if wrong := self._without_text(header):
                    yield Found(name, wrong=wrong)
                    self.summary.add("bytes", sum(map(len, stream)))
                    return
                continue
            number += 1
            if len(row) == len(header):
                yield Found(f"{name}:{number}", dict(zip(header, row, strict=True)))
            else:
                detail = f"{len(row)} columns, expected {len(header)}, up to line {rows.line_num}"
                yield Found(f"{name}:{number}", wrong=("bad_row", detail))

    def _parquet(self, stream: IO[bytes], name: str, format: Format) -> Iterator[Found]:
        table = pyarrow.parquet.ParquetFile(stream)
        about = table.metadata
        self.summary.add("bytes", sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups)))
        names = table.schema_arrow.names
        columns = [column for column in names if column in self.columns]
        if wrong := self._without_text(names):
            yield Found(name, wrong=wrong)
        else:
            yield from _rows(table.iter_batches(batch_size=64, columns=columns), columns, name)

    def _arrow(self, stream: IO[bytes], name: str, format: Format) -> Iterator[Found]:
        is_file = stream.read(len(ARROW_FILE)) == ARROW_FILE
        if not is_file:
            stream.seek(-len(ARROW_STREAM_END), SEEK_END)
            if stream.read() != ARROW_STREAM_END:  # pyarrow does not notice every cut
                yield Found(name, wrong=("unreadable", "the file is cut off; what comes before the cut is read"))
        stream.seek(0)
        reader = pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)
        names = reader.schema.names
        columns = [column for column in names if column in self.columns]

        def batches() -> Iterator[pyarrow.RecordBatch]:
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
                self.summary.add("bytes", batch.get_total_buffer_size())
                yield batch

        if wrong := self._without_text(names):
            self.summary.add("bytes", stream.seek(0, SEEK_END))
            yield Found(name, wrong=wrong)
        else:
            yield from _rows(batches(), columns, name)

    def _without_text(self, columns: list[str]) -> tuple[str, str] | None:
        """Return what is wrong with a table that has no column of texts; None if it has one."""
        if self.text_field in columns or column_of(self.text_field) in columns:
            return None
        return "no_text_field", f"expected column {column_of(self.text_field)!r}, found {', '.join(columns[:10])}"

    def _warc(self, stream: IO[bytes], name: str, format: Format) -> Iterator[Found]:
        """Read the records of extracted text (`conversion`, as in WET files) and those of pages of plain text."""
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed

        number = 0
        try:
            for record in ArchiveIterator(stream):
                number += 1
                location = f"{name}:{number}"
                content = record.content_stream().read()
                self.summary.add("bytes", len(content))
                if getattr(record.raw_stream, "limit", 0):
                    yield Found(location, wrong=("unreadable", "the record is cut off"))
                    continue
                headers = record.rec_headers
                about = {
                    "id": headers.get_header("WARC-Record-ID"),
                    "url": headers.get_header("WARC-Target-URI") or headers.get_header("uri"),
                    "date": headers.get_header("WARC-Date") or headers.get_header("archive-date"),
                }
                held = record.http_headers.get_header("Content-Type") if record.http_headers else record.content_type
                plain = record.rec_type in PAGES and (held or "").startswith("text/plain")
                if record.rec_type == "conversion" or plain:
                    yield Found(location, about, content)
                elif record.rec_type in PAGES:
                    detail = f"a {record.rec_type} of type {held}: give WET files, or extract its text first"
                    yield Found(location, about, wrong=("not_text", detail))
        except ArchiveLoadFailed as error:
            detail = f"{str(error).strip()}; this file is not read beyond here"
            yield Found(f"{name}:{number + 1}", wrong=("unreadable", detail))

    def _archive(self, members: Iterable[Member | Found], name: str, within: str) -> Iterator[Found]:
        """Read each member as if it were a file.

        In a webdataset, `KEY.json` beside `KEY.txt` is about that text, and `KEY.cls` is a label.
        """
        for _, sample in groupby(members, lambda member: member.key if isinstance(member, Member) else None):
            about: list[Member] = []
            has_text = False
            for member in sample:
                if isinstance(member, Found):
                    yield member
                    continue
                suffixes = member.parts[1:]
                has_text |= suffixes == ["txt"]
                if suffixes in (["json"], ["cls"]):
                    about.append(member)
                else:
                    yield from self._member(member, name, within)
            for member in about:
                if has_text or member.parts[1] == "cls":
                    self.summary.begin(within + METADATA)
                    self.summary.add("bytes", member.size)
                else:
                    yield from self._member(member, name, within)

    def _member(self, member: Member, name: str, within: str) -> Iterator[Found]:
        location = f"{name}:{member.id}"
        if member.content is None:
            yield Found(location, wrong=("too_large", f"more than {self.max_bytes:,} bytes"))
            return
        try:
            head = BytesIO(member.content.read(HEAD_BYTES))
            format = recognise(head, member.name, self.text_field, self.encoding)
            member.content.seek(0)
            if format.refused or (format.kind in (TAR, ZIP) and within.count(":") >= DEPTH):
                self.summary.begin(within + format.kind)
                self.summary.add("bytes", member.size)
                detail = format.refused or f"an archive in {DEPTH} archives: unpack it first"
                yield Found(location, wrong=("not_read", detail))
                return
            for found in self.read(member.content, location, format, within):
                # The first record of `KEY.json` is usually the only one, and is called by the key alone.
                yield found._replace(location=location) if found.location == f"{location}:1" else found
        except UnicodeError as error:
            yield Found(location, wrong=("not_utf8", str(error)))
        except UNREADABLE as error:
            yield Found(location, wrong=("unreadable", str(error)))


def _parsed(line: bytes, location: str) -> Found:
    try:
        return _record(json.loads(line), location)
    except UnicodeDecodeError as error:
        return Found(location, wrong=("not_utf8", str(error)))
    except (ValueError, RecursionError) as error:
        return Found(location, wrong=("bad_json", str(error)))


def _record(value: Any, location: str) -> Found:
    if isinstance(value, dict):
        return Found(location, value)
    return Found(location, wrong=("bad_json", f"a {type(value).__name__}, not an object"))


def _rows(batches: Iterable[pyarrow.RecordBatch], columns: list[str], name: str) -> Iterator[Found]:
    row = 0
    for batch in batches:
        for i in range(batch.num_rows):
            row += 1
            try:
                record = {column: batch.column(column)[i].as_py() for column in columns}
            except UnicodeDecodeError as error:
                yield Found(f"{name}:{row}", wrong=("not_utf8", str(error)))
            else:
                yield Found(f"{name}:{row}", record)


def _tar_members(stream: IO[bytes], name: str, max_bytes: int) -> Iterator[Member | Found]:
    """Iterate over the files of a tar, or of several tars one after the other.

    tarfile takes a broken or missing header for the end of the archive. Headers are therefore counted here.
    """
    headers: Counter[str] = Counter()

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
            try:
                return super().frombuf(buf, encoding, errors)  # type: ignore[return-value]
            except tarfile.HeaderError as error:
                headers[type(error).__name__] += 1
                raise

    with tarfile.open(fileobj=stream, mode="r|", tarinfo=Header, ignore_zeros=True) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
            if member.isdir():
                continue
            if wrong := _skipped(member.name, member.isfile(), member.linkname):
                yield Found(f"{name}:{member.name}", wrong=wrong)
            elif member.size > max_bytes:
                yield Member(member.name, member.size, None)
            else:
                content = tar.extractfile(member)
                assert content is not None, "a regular file"
                yield Member(member.name, member.size, _seekable(content))
    if broken := headers["InvalidHeaderError"] + headers["TruncatedHeaderError"]:
        detail = f"{broken:,} blocks of 512 bytes, where a header is expected, are none: members may be missing"
        yield Found(name, wrong=("unreadable", detail))
    elif not headers["EOFHeaderError"]:
        yield Found(name, wrong=("unreadable", "the archive has no end: it was cut off between two members"))


def _zip_members(stream: IO[bytes], name: str, max_bytes: int) -> Iterator[Member | Found]:
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if wrong := _skipped(member.filename, True, ""):
                yield Found(f"{name}:{member.filename}", wrong=wrong)
                continue
            content = None
            try:
                if member.file_size <= max_bytes:
                    with archive.open(member) as f:
                        content = _seekable(f)
            except (*UNREADABLE, RuntimeError) as error:  # a RuntimeError for a member with a password
                yield Found(f"{name}:{member.filename}", wrong=("unreadable", str(error)))
            else:
                yield Member(member.filename, member.file_size, content)


def _seekable(stream: IO[bytes]) -> IO[bytes]:
    """Return what a stream holds as a file that is read in any order: in memory if it is small, else on disk."""
    if len(start := stream.read(CHUNK)) < CHUNK:
        return BytesIO(start)
    copy = tempfile.TemporaryFile()  # noqa: SIM115  removed when nothing refers to it
    copy.write(start)
    shutil.copyfileobj(stream, copy, CHUNK)
    copy.seek(0)
    return copy


def _skipped(name: str, is_file: bool, target: str) -> tuple[str, str] | None:
    """Return why a member of an archive is not read: it is hidden, as in a directory, or no file; else None."""
    if any(
        part in HIDDEN or (part.startswith(".") and part not in (".", "..")) for part in PurePosixPath(name).parts
    ):
        return "hidden", "its name, or that of its directory, begins with a dot or is that of a cache"
    return None if is_file else ("not_a_file", f"a link to {target}" if target else "a device or pipe")
