"""Reads the rows of tables: CSV and TSV, Parquet, Arrow."""

import csv
from collections.abc import Iterable, Iterator
from io import SEEK_END
from typing import IO

import pyarrow
import pyarrow.parquet

from data_prep.fields import column_of
from data_prep.found import Found
from data_prep.summary import Summary

ARROW_FILE, ARROW_STREAM_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
# Types of which not all bytes are a value, and those with the same layout in memory of which all are.
ANY_BYTES = {
    pyarrow.string(): pyarrow.binary(),
    pyarrow.large_string(): pyarrow.large_binary(),
    pyarrow.string_view(): pyarrow.binary_view(),
    pyarrow.date64(): pyarrow.int64(),
}
MAX_ROWS, BATCH_BYTES = 64, 1 << 22  # of a batch of Parquet, at most and about


class TableReader:
    """Reads tables.

    Args:
        text_field: path of the text in a row.
        columns: outermost fields that are needed; other columns are not read.
        max_bytes: of a field of CSV.
        summary: counts the bytes.
    """

    def __init__(self, text_field: str, columns: set[str], max_bytes: int, summary: Summary) -> None:
        self.text_field, self.columns = text_field, columns
        self.max_bytes, self.summary = max_bytes, summary

    def csv(self, stream: IO[bytes], name: str, separator: str) -> Iterator[Found]:
        csv.field_size_limit(self.max_bytes)

        def lines() -> Iterator[str]:
            for number, line in enumerate(stream):
                self.summary.add("bytes", len(line))
                yield line.decode("utf-8" if number else "utf-8-sig", "surrogateescape")

        rows = csv.reader(lines(), delimiter=separator, strict=True)
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

    def parquet(self, stream: IO[bytes], name: str) -> Iterator[Found]:
        table = pyarrow.parquet.ParquetFile(stream)
        about = table.metadata
        size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        self.summary.add("bytes", size)
        names = table.schema_arrow.names
        columns = [column for column in names if column in self.columns]
        if wrong := self._without_text(names):
            yield Found(name, wrong=wrong)
        else:
            rows = max(1, min(MAX_ROWS, about.num_rows * BATCH_BYTES // max(size, 1)))
            yield from _rows(table.iter_batches(batch_size=rows, columns=columns), columns, name)

    def arrow(self, stream: IO[bytes], name: str) -> Iterator[Found]:
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
                for column in columns:
                    _check(batch.column(column))
                yield batch
            if not is_file and stream.read(1):  # bytes of zero stand for the end, as they do in a damaged file
                raise pyarrow.ArrowInvalid("the stream ends before the file does: records may be missing")

        if wrong := self._without_text(names):
            self.summary.add("bytes", stream.seek(0, SEEK_END))
            yield Found(name, wrong=wrong)
        else:
            yield from _rows(batches(), columns, name)

    def _without_text(self, columns: list[str]) -> tuple[str, str] | None:
        """Return what is wrong with a table that has no column of texts, or two of a name; None if nothing is."""
        if twice := sorted(column for column in self.columns if columns.count(column) > 1):
            return "no_text_field", f"expected column {twice[0]!r} once, found it {columns.count(twice[0])} times"
        if self.text_field in columns or column_of(self.text_field) in columns:
            return None
        return "no_text_field", f"expected column {column_of(self.text_field)!r}, found {', '.join(columns[:10])}"


def _check(values: pyarrow.Array) -> None:
    """Raise ArrowInvalid for values that would lead outside of memory, which pyarrow itself does not notice.

    What lies within memory is not judged here: a text that is not UTF-8 leaves out its row alone, and some writers
    put a time of day into dates.
    """
    values.view(_without_meaning(values.type)).validate(full=True)


def _without_meaning(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return the type with the same layout in memory whose values may have any bytes."""
    is_a = pyarrow.types
    if is_a.is_struct(kind):
        return pyarrow.struct([field.with_type(_without_meaning(field.type)) for field in kind])
    if is_a.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_without_meaning(kind.value_type)))
    if is_a.is_fixed_size_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_without_meaning(kind.value_type)), kind.list_size)
    if is_a.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_without_meaning(kind.value_type)))
    if is_a.is_map(kind):
        return pyarrow.map_(_without_meaning(kind.key_type), _without_meaning(kind.item_type))
    if is_a.is_dictionary(kind):
        return pyarrow.dictionary(kind.index_type, _without_meaning(kind.value_type))
    return ANY_BYTES.get(kind, kind)


def _rows(batches: Iterable[pyarrow.RecordBatch], columns: list[str], name: str) -> Iterator[Found]:
    row = 0
    for batch in batches:
        for i in range(batch.num_rows):
            row += 1
            try:
                record = {column: batch.column(column)[i].as_py() for column in columns}
            except UnicodeDecodeError as error:
                yield Found(f"{name}:{row}", wrong=("not_utf8", str(error)))
            except (ValueError, OverflowError) as error:  # of a value that Python's types do not hold, such as a time
                yield Found(f"{name}:{row}", wrong=("bad_row", str(error)))
            else:
                yield Found(f"{name}:{row}", record)
