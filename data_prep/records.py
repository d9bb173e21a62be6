"""Reads the texts and records that one file holds, whatever its format."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import groupby
from typing import IO

from data_prep import formats
from data_prep.archives import Member, tar_members, zip_members
from data_prep.formats import HEAD_BYTES, Format, recognise, uncompressed
from data_prep.found import CHUNK, UNREADABLE, Found, seekable
from data_prep.json_records import read_json, read_json_lines
from data_prep.summary import Summary
from data_prep.tables import TableReader
from data_prep.warc import read_warc

DEPTH = 3  # of archives in archives
NOT_IN_ORDER = {formats.PARQUET, formats.ARROW, formats.ZIP}  # formats that are not read from front to back


class RecordReader:
    """Reads files.

    Args:
        text_field: path of the text in a record.
        columns: outermost fields that are needed; other columns of tables are not read.
        encoding: that of members of archives, as `recognise` takes it.
        max_bytes: of a document; a larger one is not read.
        summary: counts what is read.
        as_text: patterns of names of members of archives that hold a text each, as `recognise` takes them.
    """

    def __init__(
        self,
        text_field: str,
        columns: set[str],
        encoding: str | None,
        max_bytes: int,
        summary: Summary,
        as_text: Sequence[str] = (),
    ) -> None:
        self.text_field, self.encoding, self.as_text = text_field, encoding, as_text
        self.max_bytes, self.summary = max_bytes, summary
        self._tables = TableReader(text_field, columns, max_bytes, summary)

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
        if format.layers and format.kind in NOT_IN_ORDER:
            content = seekable(content)
        if format.kind in (formats.TAR, formats.ZIP):
            members = tar_members if format.kind == formats.TAR else zip_members
            yield from self._archive(members(content, name, self.max_bytes), name, kind + ": ")
            return
        self.summary.begin(kind)
        match format.kind:
            case formats.JSON_LINES:
                yield from read_json_lines(content, name, self.max_bytes, self.summary)
            case formats.JSON:
                yield from read_json(content, name, self.max_bytes, self.summary)
            case formats.TABLE:
                yield from self._tables.csv(content, name, format.separator)
            case formats.PARQUET:
                yield from self._tables.parquet(content, name)
            case formats.ARROW:
                yield from self._tables.arrow(content, name)
            case formats.WARC:
                yield from read_warc(content, name, self.summary)
            case formats.METADATA:
                self.summary.add("bytes", len(content.read()))
            case _:
                yield from self._text(content, name)

    def _text(self, stream: IO[bytes], name: str) -> Iterator[Found]:
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
                    self.summary.begin(within + formats.METADATA)
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
            path = f"{name}/{member.name}"
            format = recognise(head, path, self.text_field, self.encoding, self.as_text)
            member.content.seek(0)
            if format.refused or (format.kind in (formats.TAR, formats.ZIP) and within.count(":") >= DEPTH):
                self.summary.begin(within + format.kind)
                self.summary.add("bytes", member.size)
                detail = format.refused or f"an archive in {DEPTH} archives: unpack it first"
                yield Found(location, wrong=("not_read", detail))
                return
            for found in self.read(member.content, location, format, within):
                # The first record of `KEY.json` is usually the only one, and is called by the key alone.
                called = location if found.location == f"{location}:1" else found.location
                below = f"{member.name}/{found.member}" if found.member else member.name
                yield found._replace(location=called, member=below)
        except UnicodeError as error:
            yield Found(location, wrong=("not_utf8", str(error)))
        except UNREADABLE as error:
            yield Found(location, wrong=("unreadable", str(error)))
