"""Reads the documents of a corpus in a fixed order; what cannot be read becomes a Reject."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_prep.fields import BadChat, Heading, NoField, column_of, render_chat, texts_with_headings, value_at
from data_prep.formats import RECORDS
from data_prep.found import UNREADABLE, Found
from data_prep.input_files import InputFile
from data_prep.records import RecordReader
from data_prep.summary import Summary
from data_prep.texts import BadText, LineEnds, LongText, TextReader, UnicodeForm

MAX_BYTES = 1 << 30  # of a document; what is larger is more often a dump of many than one text
# 2**64 divided by the golden ratio. The first n multiples of it, modulo 2**64, are spread evenly for any n.
GOLDEN_RATIO = 0x9E3779B97F4A7C15

DocumentPosition = tuple[int, int]  # number of the file in the corpus, number of the document or reject in the file


class Document(NamedTuple):
    """One text of the corpus."""

    id: str  # unique within the corpus
    source: str  # name of the file that holds it
    text: str | LongText
    group: str | None = None  # documents of one group are joined (see `join` of DocumentReader)
    heading: str = ""  # a line before it in the document of its group
    bands: bytes = b""  # of its MinHash signature, if near-duplicates are left out (near_duplicates.py)

    def whole(self) -> "Document | Reject":
        """Return the document with its text in one string, or a reject if there is a fault in a long text."""
        if isinstance(self.text, str):
            return self
        try:
            return self._replace(text="".join(self.text))
        except BadText as error:
            return Reject(self.id, self.source, error.reason, error.detail)


@dataclass(frozen=True)
class Reject:
    """A document that is left out, or the rest of a file that cannot be read.

    `reason` is one of empty, not_utf8, nul_bytes, bad_json, bad_row, bad_chat, no_text_field, text_not_a_string,
    too_large, not_text, not_read, unreadable, symlink_loop, and in archives hidden and not_a_file, which the reader
    finds, the name of a block of the pipeline, or duplicate, duplicate_id and too_short, which planning finds.
    """

    id: str
    source: str
    reason: str
    detail: str


def group_of_path(path: str, join: str) -> tuple[str, str]:
    """Return a file's group for `join="directory"` (its directory) or "directory:N" (the first N below the input).

    Archives are directories of their members. Also returns the file's path in that group.
    """
    parts = Path(path).parts
    depth = join.partition(":")[2]
    end = min(int(depth) + 1, len(parts) - 1) if depth else len(parts) - 1
    return "/".join(parts[:end]), "/".join(parts[end:])


class DocumentReader:
    """Iterates over one task's share of the documents and rejects of `files`.

    Each document belongs to exactly one task. The assignment depends only on the order and sizes of the files, and
    gives all tasks about the same number of bytes. Usually one task reads a whole file. A file of many documents that
    is far larger than a task's share is split among several tasks: each of them reads all of it and keeps its own
    documents. `bytes_read` of `bytes_total` bytes measures the progress, and `summary` counts what was read.

    Args:
        files: all files of the corpus, from `find_inputs`.
        text_field: path of the text in a record (see `fields.value_at`).
        id_field: path of the id. In records without it, or if it is empty, file name and line or row are the id.
        task: number of this task, from 0.
        tasks: number of tasks.
        unicode_form: normalisation of the text; "none" also keeps a byte order mark.
        line_ends: "lf" makes all line ends \\n, "keep" leaves them as they are.
        join: what documents of one group share: "directory", "directory:N" or the path of a field.
        heading: template of a line before each of the documents that are joined (see `fields.Heading`).
        encoding: that of texts in archives, None for UTF-8, "detect" to find out.
        chat_template: Jinja template of the text of a list of messages.
        as_text: patterns of names of members of archives that hold a text each, whatever they look like.
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
        line_ends: LineEnds = "lf",
        join: str | None = None,
        heading: str | None = None,
        encoding: str | None = None,
        chat_template: str | None = None,
        as_text: Sequence[str] = (),
    ) -> None:
        self.files = files
        self.text_field = text_field
        self.id_field = id_field
        self.task = task
        self.tasks = tasks
        self.join = join
        self.join_field = join if join and join.split(":")[0] != "directory" else None
        self.heading = Heading(heading) if heading else None
        self.encoding = encoding
        self.chat_template = chat_template
        self.as_text = as_text
        self.summary = Summary()
        self._texts = TextReader(unicode_form, line_ends, MAX_BYTES, self.summary)
        self._sizes = [file.size for file in files]
        # The start of each file in the concatenation of all; one extra byte gives empty files a place of their own.
        self._starts = list(accumulate((size + 1 for size in self._sizes), initial=0))
        share = self._starts[-1] / tasks
        self._split_files = {
            number
            for number, file in enumerate(files)
            if file.format.kind in RECORDS and self._sizes[number] > 1.5 * share
        }
        self._to_read = [number for number in range(len(files)) if task in self._readers(number)]
        self.bytes_total = sum(self._sizes[number] for number in self._to_read)
        self._finished = 0
        self._raw: IO[bytes] | None = None

    @property
    def bytes_read(self) -> int:
        return self._finished + (self._raw.tell() if self._raw else 0)

    def __iter__(self) -> Iterator[Document | Reject]:
        """Iterate over whole documents and rejects."""
        return (item.whole() if isinstance(item, Document) else item for _, item in self.with_positions())

    def with_positions(self) -> Iterator[tuple[DocumentPosition, Document | Reject]]:
        """Iterate over (position, document or reject); positions ascend and do not depend on the number of tasks.

        A long text must be read before the next item, or not at all.
        """
        for number in self._to_read:
            name, is_split = self.files[number].name, number in self._split_files
            for record, found in enumerate(self._found(number)):
                if not is_split or self._task_of(number, record) == self.task:
                    yield (number, record), self._item(found, name)
            self._finished += self._sizes[number]

    def _task_of(self, number: int, record: int) -> int:
        """Return the task to which a record of a file belongs that several tasks read.

        A record's own offset is unknown in compressed files, so the records of a file are spread evenly over its
        bytes, and a record belongs to the task whose share contains the byte it is assigned.
        """
        start, end = self._starts[number : number + 2]
        return self._task_at(start + ((end - start) * ((record + 1) * GOLDEN_RATIO % 2**64) >> 64))

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

    def _found(self, number: int) -> Iterator[Found]:
        """Iterate over what a file holds, and count it."""
        file = self.files[number]
        if file.wrong:
            yield Found(file.name, wrong=file.wrong)
            return
        if not file.size and file.format.kind in RECORDS:  # as a download that failed leaves it
            yield Found(file.name, wrong=("empty", "the file has no bytes"))
            return
        paths = [path for path in (self.text_field, self.id_field, self.join_field) if path]
        paths += self.heading.fields if self.heading else []
        columns = {*paths, *map(column_of, paths)}
        reader = RecordReader(self.text_field, columns, self.encoding, MAX_BYTES, self.summary, self.as_text)
        # Several tasks may read a file; the first of them counts its bytes.
        self.summary.counts_bytes = self.task == self._readers(number)[0]
        try:
            with file.open() as self._raw:
                yield from reader.read(self._raw, file.name, file.format)
        except UnicodeError as error:
            yield Found(file.name, wrong=("not_utf8", str(error)))
        except UNREADABLE as error:
            yield Found(file.name, wrong=("unreadable", str(error)))
        finally:
            self._raw = None

    def _item(self, found: Found, source: str) -> Document | Reject:
        """Make a document of what was found, or a reject."""
        if found.wrong:
            return Reject(found.location, source, *found.wrong)
        id, group, text, line = found.location, None, found.text, ""
        heads_parts = self.heading is not None and "[]." in self.text_field  # of the text of one record
        if found.record is not None:
            named = self._field("id_field", found.record, self.id_field) if self.id_field else None
            id = id if named is None else str(named)
            group = self._field("join", found.record, self.join_field) if self.join_field else None
            self.summary.fields["records"] += 1
            try:
                if text is None and self.heading and heads_parts:
                    text = texts_with_headings(found.record, self.text_field, self.heading)
                elif text is None:
                    text = value_at(found.record, self.text_field)
                if self.heading and self.join_field and group is not None and not heads_parts:
                    line = self.heading.of_record(found.record)
            except NoField as error:
                return Reject(id, source, "no_text_field", str(error))
        if self.join and not self.join_field:
            group, path = group_of_path(f"{source}/{found.member}" if found.member else source, self.join)
            if self.heading and not heads_parts:
                try:
                    line = self.heading.of_path(path)
                except NoField as error:
                    return Reject(id, source, "no_text_field", f"{error}, the heading of files")
        return self._document(id, source, text, group, line)

    def _field(self, option: str, record: dict[str, Any], path: str) -> Any:
        """Return a field, None if the record lacks it; `summary` tells in the end whether all records lack it."""
        try:
            value = value_at(record, path)
        except NoField:
            return None
        self.summary.fields[option] += 1
        return value

    def _document(self, id: str, source: str, text: Any, group: Any, line: str) -> Document | Reject:
        try:
            if isinstance(text, list) and self.chat_template:
                text = render_chat(text, self.chat_template)
            if not isinstance(text, (str, bytes, Iterator)):
                return Reject(id, source, "text_not_a_string", _not_a_string(text, self.text_field))
            text, line = self._texts.text_of(text), self._texts.line_of(line)
        except BadText as error:
            return Reject(id, source, error.reason, error.detail)
        except BadChat as error:
            return Reject(id, source, "bad_chat", str(error))
        return Document(id, source, text, None if group is None else str(group), line)


def _not_a_string(text: Any, text_field: str) -> str:
    found = f"it is {type(text).__name__}"
    if isinstance(text, list) and text and isinstance(text[0], str):
        return f"{found}: --text_field '{text_field}[]' joins its strings"
    if isinstance(text, list) and text and isinstance(text[0], dict):
        fields = ", ".join(sorted(map(str, text[0]))[:10])
        return f"{found} of objects with {fields}: see --text_field '{text_field}[].FIELD' and --chat_template"
    if isinstance(text, dict):
        return f"{found} with {', '.join(sorted(map(str, text))[:10])}: --text_field '{text_field}.FIELD' names one"
    return found
