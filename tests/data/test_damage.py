"""Files that a copy or a disk has damaged: what their libraries would pass over is told."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warcio.warcwriter import WARCWriter

import data_prep.tables as tables
from data_prep.documents import Document, DocumentReader
from data_prep.sources import find_inputs
from tests.helpers.corpora import text
from tests.helpers.reading import read

TEXTS = [text(number, 20) for number in range(6)]


def arrow_stream() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv.zst", "a.parquet", "a.arrow", "a.warc.gz"]
)
def test_empty_files_of_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert read(tmp_path / name)[:2] == ([], {name: "empty"})


def test_arrow_stream_with_zeros(tmp_path: Path) -> None:
    """Zeros where a message is expected stand for the end."""
    content = arrow_stream()
    second = content.index(b"\xff\xff\xff\xff", content.index(TEXTS[1].encode()))
    (tmp_path / "a.arrow").write_bytes(content[:second] + bytes(64) + content[second + 64 :])
    assert pa.ipc.open_stream(tmp_path / "a.arrow").read_all().num_rows == 2
    texts, rejects, _ = read(tmp_path / "a.arrow")
    assert (texts, rejects) == (TEXTS[:2], {"a.arrow": "unreadable"})


def test_arrow_offsets_that_descend(tmp_path: Path) -> None:
    """pyarrow ends the process for a value of negative length."""
    content = arrow_stream()
    sizes = [len(one.encode()) for one in TEXTS[2:4]]
    offsets = struct.pack("<3i", 0, sizes[0], sum(sizes))
    assert content.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(offsets, struct.pack("<3i", 0, sum(sizes), sizes[0])))
    texts, rejects, _ = read(tmp_path / "a.arrow")
    assert (texts, rejects) == (TEXTS[:2], {"a.arrow": "unreadable"})


def test_arrow_offsets_that_descend_beside_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    """The first fault that pyarrow finds is the harmless one."""
    row = pa.array([{"text": TEXTS[0], "note": "1111111"}, {"text": TEXTS[1], "note": "222"}])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema({"data": row.type})) as writer:
        writer.write_table(pa.table({"data": row}))
    content = sink.getvalue().to_pybytes().replace(TEXTS[0].encode(), b"\xff" * len(TEXTS[0].encode()))
    offsets = struct.pack("<3i", 0, 7, 10)
    assert content.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(offsets, struct.pack("<3i", 0, 10, 7)))
    assert read(tmp_path / "a.arrow", text_field="data.text")[:2] == ([], {"a.arrow": "unreadable"})


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.string(), lambda one: one),
        (pa.large_string(), lambda one: one),
        (pa.string_view(), lambda one: one),
        (pa.list_(pa.string()), lambda one: [one]),
        (pa.large_list(pa.string()), lambda one: [one]),
        (pa.list_(pa.string(), 1), lambda one: [one]),
        (pa.struct({"a": pa.string()}), lambda one: {"a": one}),
        (pa.map_(pa.int64(), pa.string()), lambda one: [(1, one)]),
        (pa.list_(pa.struct({"a": pa.string()})), lambda one: [{"a": one}]),
    ],
)
def test_texts_that_are_not_utf8_leave_out_their_rows_alone(
    tmp_path: Path, kind: pa.DataType, value: Callable[[str], object]
) -> None:
    ids = pa.array([value(f"id number {number}") for number in range(3)], kind)
    sink = pa.BufferOutputStream()
    table = pa.table({"text": TEXTS[:3], "id": ids})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.arrow").write_bytes(sink.getvalue().to_pybytes().replace(b"id number 1", b"id number \xff"))
    assert read(tmp_path / "a.arrow")[:2] == ([TEXTS[0], TEXTS[2]], {"a.arrow:2": "not_utf8"})


def test_arrow_values_that_are_odd_but_readable(tmp_path: Path) -> None:
    """Arrow in JavaScript writes dates with a time of day; a dictionary and a slice are as good as others."""
    milliseconds = pa.array([1, 86_400_001, 3])
    dates = pa.Array.from_buffers(pa.date64(), 3, milliseconds.buffers())
    table = pa.table({"text": pa.array(TEXTS[:3]).dictionary_encode(), "id": dates}).slice(1)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.arrow").write_bytes(sink.getvalue().to_pybytes())
    assert read(tmp_path / "a.arrow")[:2] == (TEXTS[1:3], {})


def test_batches_of_long_rows_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    sizes: list[int] = []
    rows = tables._rows
    monkeypatch.setattr(
        tables, "_rows", lambda batches, *rest: rows((sizes.append(b.num_rows) or b for b in batches), *rest)
    )
    for batch_bytes, expected in ((1 << 22, [6]), (1, [1] * 6)):
        monkeypatch.setattr(tables, "BATCH_BYTES", batch_bytes)
        assert read(tmp_path / "a.parquet")[:2] == (TEXTS, {})
        assert sizes == expected
        sizes.clear()


def test_warc_records_that_warcio_passes_over(tmp_path: Path) -> None:
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=False)
    for one in TEXTS:
        payload = io.BytesIO(one.encode())
        writer.write_record(writer.create_warc_record("urn:x", "conversion", payload=payload))
    content, path = out.getvalue(), tmp_path / "a.warc"
    length = f"Content-Length: {len(TEXTS[1].encode())}\r\n".encode()
    start = content.index(length, content.index(TEXTS[0].encode()))
    path.write_bytes(content[:start] + length.replace(b": ", b": 1") + content[start + len(length) :])
    texts, rejects, _ = read(path)  # the second record takes the next ones with it
    assert len(texts) < 6 and set(rejects.values()) == {"unreadable"}
    start = content.index(b"conversion", content.index(TEXTS[0].encode()))
    path.write_bytes(content[:start] + b"konversion" + content[start + 10 :])
    texts, rejects, _ = read(path)
    assert texts == [TEXTS[0], *TEXTS[2:]] and set(rejects.values()) == {"unreadable"}


def test_zip_with_a_link_and_without_its_list(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", TEXTS[0])
        link = zipfile.ZipInfo("b.txt")
        link.create_system, link.external_attr = 3, 0o120777 << 16  # as `zip --symlinks` and GitHub write it
        archive.writestr(link, "a.txt")
    assert read(path)[:2] == ([TEXTS[0]], {"a.zip:b.txt": "not_a_file"})
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06") + 4
    path.write_bytes(content[:end] + bytes(len(content) - end))
    assert not zipfile.ZipFile(path).infolist()
    assert read(path)[:2] == ([], {"a.zip": "unreadable"})
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"nothing was found"
    assert read(path)[:2] == ([], {})


def test_columns_of_the_same_name(tmp_path: Path) -> None:
    """One of them would be read and the other not, or pyarrow would end the job."""
    columns = [pa.array(TEXTS), pa.array(TEXTS[::-1])]
    pq.write_table(pa.table(columns, names=["text", "text"]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,id,text\none,1,two\n")
    for name in ("a.parquet", "a.csv"):
        assert read(tmp_path / name)[:2] == ([], {name: "no_text_field"})


def test_values_that_python_cannot_hold(tmp_path: Path) -> None:
    ids = pa.array([1, 10**15, 3], pa.timestamp("s"))  # the second is in the year 31,690,708
    pq.write_table(pa.table({"text": TEXTS[:3], "id": ids}), tmp_path / "a.parquet")
    texts, rejects, _ = read(tmp_path / "a.parquet")
    assert (texts, rejects) == ([TEXTS[0], TEXTS[2]], {"a.parquet:2": "bad_row"})


def test_too_large_a_text_of_any_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that its library gives as a string."""
    monkeypatch.setattr("data_prep.documents.MAX_BYTES", 3000)
    for length, reason in ((1000, None), (4000, "too_large")):
        pq.write_table(pa.table({"text": ["é" * (length // 2)]}), tmp_path / "a.parquet")
        (tmp_path / "a.txt").write_text("é" * (length // 2))
        for chunk in (1 << 20, 700):
            for module in ("records", "texts"):
                monkeypatch.setattr(f"data_prep.{module}.CHUNK", chunk)
            for name in ("a.parquet", "a.txt"):
                (item,) = DocumentReader(find_inputs([tmp_path / name], tmp_path / "out"), "text", "id")
                assert isinstance(item, Document) if not reason else getattr(item, "reason", None) == reason
