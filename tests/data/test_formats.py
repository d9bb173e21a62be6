"""Formats are recognised whatever files are called. The libraries of the formats write the files."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import warcio.warcwriter
from warcio.statusandheaders import StatusAndHeaders

import data_prep.documents as documents
from data_prep.formats import recognise
from data_prep.summary import Summary
from tests.helpers.corpora import text
from tests.helpers.reading import json_lines, read, tar, zipped

TEXTS = [f'{text(i, 40)}"quoted", naïve,\ttab\nend {i}' for i in range(6)]
RECORDS = [{"id": f"doc{i}", "text": content, "stars": i} for i, content in enumerate(TEXTS)]


def table(separator: str) -> bytes:
    out = io.StringIO()
    rows = csv.DictWriter(out, ["id", "text", "stars"], delimiter=separator)
    rows.writeheader()
    rows.writerows(RECORDS)
    return out.getvalue().encode()


def arrow_file() -> bytes:
    out = io.BytesIO()
    batch = pa.RecordBatch.from_pylist(RECORDS)
    with pa.ipc.new_file(out, batch.schema) as writer:
        writer.write_batch(batch)
    return out.getvalue()


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), out)
    return out.getvalue()


def wet(gzipped: bool) -> bytes:
    out = io.BytesIO()
    writer = warcio.warcwriter.WARCWriter(out, gzip=gzipped)
    writer.write_record(writer.create_warcinfo_record("file.wet", {"software": "test"}))
    for content in TEXTS:
        payload = io.BytesIO(content.encode())
        record = writer.create_warc_record(
            "https://a.org/", "conversion", payload=payload, warc_content_type="text/plain"
        )
        writer.write_record(record)
    return out.getvalue()


def responses(kind: str, contents: list[bytes]) -> bytes:
    """A WARC of web pages, with a request before each."""
    out = io.BytesIO()
    writer = warcio.warcwriter.WARCWriter(out, gzip=True)
    for number, content in enumerate(contents):
        asked = StatusAndHeaders("GET / HTTP/1.1", [("Host", "a.org")], is_http_request=True)
        writer.write_record(writer.create_warc_record("https://a.org/", "request", http_headers=asked))
        told = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.1")
        payload = io.BytesIO(content)
        headers = {"WARC-Record-ID": f"<urn:{number}>"}
        record = writer.create_warc_record(
            "https://a.org/", "response", payload=payload, http_headers=told, warc_headers_dict=headers
        )
        writer.write_record(record)
    return out.getvalue()


def arc(contents: list[bytes]) -> bytes:
    """The format before WARC, by its documented layout."""
    out = b"filedesc://a.arc 0.0.0.0 20260101000000 text/plain 76\n1 0 test\n"
    out += b"URL IP-address Archive-date Content-type Archive-length\n".ljust(67, b" ") + b"\n"
    for content in contents:
        body = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + content
        out += f"http://a.org/ 1.1.1.1 20260101000000 text/plain {len(body)}\n".encode() + body + b"\n"
    return out


def frames(compression: str, parts: list[bytes]) -> bytes:
    """Compress each part on its own, as several members or frames."""

    def one(part: bytes) -> bytes:
        if compression in ("gz", "bz2", "xz"):
            return {"gz": gzip, "bz2": bz2, "xz": lzma}[compression].compress(part)  # type: ignore[attr-defined]
        out = pa.BufferOutputStream()
        with pa.CompressedOutputStream(out, {"zst": "zstd", "lz4": "lz4"}[compression]) as stream:
            stream.write(part)
        return out.getvalue().to_pybytes()

    return b"".join(map(one, parts))


LINES = json_lines(RECORDS)
FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    # what writes it so: file name, content, kind
    "Dolma, C4, peS2o, RedPajama-V2": ("c4-train.00000.json.gz", lambda: gzip.compress(LINES), "JSON lines"),
    "wikiextractor --json": ("wiki_00", lambda: LINES, "JSON lines"),
    "upper case": ("A.JSONL", lambda: LINES, "JSON lines"),
    "ndjson": ("a.ndjson", lambda: LINES, "JSON lines"),
    "JSON lines with a byte order mark": ("a.txt", lambda: b"\xef\xbb\xbf" + LINES, "JSON lines"),
    "an array on one line": ("a.json", lambda: json.dumps(RECORDS).encode(), "JSON"),
    "an indented array": ("a.json", lambda: json.dumps(RECORDS, indent=2).encode(), "JSON"),
    "an indented array with no suffix": ("array", lambda: json.dumps(RECORDS, indent=2).encode(), "JSON"),
    "indented objects": ("o.json", lambda: "\n".join(json.dumps(r, indent=1) for r in RECORDS).encode(), "JSON"),
    "objects on one line": ("o.json", lambda: " ".join(map(json.dumps, RECORDS)).encode(), "JSON"),
    "csv": ("a.csv", lambda: table(","), "CSV/TSV"),
    "tsv": ("A.TSV", lambda: table("\t"), "CSV/TSV"),
    "a table without a suffix": ("table", lambda: table(";"), "CSV/TSV"),
    "Parquet": ("a.parquet", parquet, "Parquet"),
    "Parquet of another name": ("PART-0.SNAPPY", parquet, "Parquet"),
    "JSON lines in lzma": ("A.JSONL.LZMA", lambda: lzma.compress(LINES, lzma.FORMAT_ALONE), "JSON lines"),
    "Parquet in gzip": ("a.parquet.gz", lambda: gzip.compress(parquet()), "Parquet"),
    "an Arrow file": ("a.feather", arrow_file, "Arrow"),
    "Arrow in zstd": ("a.arrow.zst", lambda: frames("zst", [arrow_file()]), "Arrow"),
    "Common Crawl's WET": ("CC-MAIN-0.warc.wet.gz", lambda: wet(True), "WARC"),
    "WET without compression": ("a", lambda: wet(False), "WARC"),
    "WARC of plain text": (
        "a.warc.gz",
        lambda: responses("text/plain; charset=utf-8", [content.encode() for content in TEXTS]),
        "WARC",
    ),
    "ARC": ("a.arc", lambda: arc([content.encode() for content in TEXTS]), "WARC"),
    "a tgz of texts": (
        "a.tgz",
        lambda: tar({f"a/{i}.md": t.encode() for i, t in enumerate(TEXTS)}, "w:gz"),
        "tar: text",
    ),
    "a tar of compressed lines": ("a.tar", lambda: tar({"x/y.jsonl.gz": gzip.compress(LINES)}), "tar: JSON lines"),
    "a tar called otherwise": ("archive", lambda: tar({"a.parquet": parquet()}), "tar: Parquet"),
    "a zip of lines": ("a.zip", lambda: zipped({"x/": b"", "x/train": LINES}), "zip: JSON lines"),
    "a zip of texts": ("a.zip", lambda: zipped({f"{i}.txt": t.encode() for i, t in enumerate(TEXTS)}), "zip: text"),
    "a tar in a zip": ("a.zip", lambda: zipped({"x.tar.bz2": tar({"a": LINES}, "w:bz2")}), "zip: tar: JSON lines"),
}


@pytest.mark.parametrize("case", FILES)
def test_recognised_by_content(tmp_path: Path, case: str) -> None:
    name, content, kind = FILES[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content())
    for tasks in (1, 3):
        texts, rejects, summary = read(tmp_path / "in", tasks, unicode_form="none", line_ends="keep")
        assert texts == TEXTS and not rejects
        counts = summary.kinds[kind]
        assert counts["documents"] == 6 and counts["text_bytes"] == sum(len(t.encode()) for t in TEXTS)
        assert counts["files"] == (6 if kind in ("tar: text", "zip: text") else 1)
        # What is read of a table in columns is not a number of bytes that anyone can state.
        if kind not in ("Parquet", "Arrow", "tar: Parquet"):
            assert 0.5 < counts["text_bytes"] / counts["bytes"] <= 1
        assert summary.fault() is None


def test_saved_by_datasets(tmp_path: Path) -> None:
    """`save_to_disk` writes Arrow streams beside metadata, which are no documents."""
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": data, "test": data.select(range(2))}).save_to_disk(tmp_path / "two")
    for name, expected in (("one", TEXTS), ("two", TEXTS[:2] + TEXTS)):
        texts, rejects, summary = read(tmp_path / name)
        assert (texts, rejects) == (expected, {})
        assert summary.kinds["metadata"]["documents"] == 0 and summary.kinds["metadata"]["files"] > 1
    cut = tmp_path / "one" / "data-00000-of-00002.arrow"
    cut.write_bytes(cut.read_bytes()[:-8])
    texts, rejects, _ = read(tmp_path / "one")
    assert rejects == {"one/data-00000-of-00002.arrow": "unreadable"}


@pytest.mark.parametrize("compression", ["gz", "zst", "bz2", "xz", "lz4"])
def test_compressions_of_several_members(tmp_path: Path, compression: str) -> None:
    """All members are read, also after a skippable frame as pzstd writes it, and a file that is cut off is told."""
    (tmp_path / "in").mkdir()
    lines = frames(compression, [json_lines(RECORDS[:4]), json_lines(RECORDS[4:])])
    if compression == "zst":
        lines = b"\x50\x2a\x4d\x18\x04\0\0\0size" + lines
    (tmp_path / "in" / f"a.jsonl.{compression}").write_bytes(lines)
    (tmp_path / "in" / "b").write_bytes(frames(compression, [b"one text, ", b"one document"]))
    texts, rejects, summary = read(tmp_path / "in")
    assert texts == [*TEXTS, "one text, one document"] and not rejects
    assert summary.kinds["JSON lines"]["bytes"] == len(LINES)
    (tmp_path / "in" / "b").write_bytes(frames(compression, [b"one text, " * 50])[:-3])
    assert read(tmp_path / "in")[1] == {"in/b": "unreadable"}


def checkpoint() -> bytes:
    """With members of plain text, such as its version."""
    out = io.BytesIO()
    torch.save({"a": torch.ones(2)}, out)
    return out.getvalue()


def arrays() -> bytes:
    out = io.BytesIO()
    np.savez(out, a=np.ones(2))
    return out.getvalue()


REFUSED = {
    "MosaicML": ("index.json", json.dumps({"version": 2, "shards": [{"format": "mds"}]}).encode()),
    "litdata": ("index.json", json.dumps({"chunks": [], "config": {}}).encode()),
    "infini-train made": ("index.json", json.dumps({"tokenizer_sha256": ""}).encode()),
    "Zarr": ("zarr.json", b"{}"),
    "PDF": ("a.txt", b"%PDF-1.7\n"),
    "NumPy": ("a.npy", b"\x93NUMPY\x01\0"),
    "Megatron": ("a.idx", b"MMIDIDX\0\0"),
    "datatrove": ("a.ds", b"\x01\0\x02\0"),
    "Avro": ("a", b"Obj\x01"),
    "TFRecord": ("a.tfrecord", b"\x08\0\0\0\0\0\0\0text"),
    "TFRecord: export": ("c4-train.TFRecord-00000-of-00512", b"\x08\0\0\0\0\0\0\0text"),
    "MDS": ("shard.00000.mds", b"\x02\0\0\0\x10\0\0\0\x14\0\0\0text"),
    "SQLite": ("a.db", b"SQLite format 3\0"),
    "packed": ("a.7z", b"7z\xbc\xaf\x27\x1c"),
    "dump of MediaWiki": ("pages.xml.bz2", bz2.compress(b'<mediawiki xmlns="x">')),
    "--json": ("wiki_00", b'<doc id="1" url="u" title="t">\ntext\n</doc>\n'),
    "Office": ("a", zipped({"[Content_Types].xml": b"<x/>"})),
    "EPUB": ("book", zipped({"mimetype": b"application/epub+zip", "a.xhtml": b"<p>text</p>"})),
    "PyTorch": ("model.bin", checkpoint()),
    "NumPy arrays": ("arrays", arrays()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path: Path, name: str) -> None:
    file, content = REFUSED[name]
    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "in" / "x" / file).write_bytes(content)
    (tmp_path / "in" / "good.txt").write_text("a text")
    with pytest.raises(ValueError, match=rf"(?s)in/x.*{name}.*--accept"):
        read(tmp_path / "in")
    texts, rejects, _ = read(tmp_path / "in", accept=True)
    assert texts == ["a text"] and list(rejects.values()) == ["not_read"]


def test_texts_that_begin_like_something_else(tmp_path: Path) -> None:
    """Texts stay texts; markup is one, too, but the summary says so; records without a text are left out."""
    root = tmp_path / "in"
    root.mkdir()
    texts = {
        "a.c": "{ x = 1; }",
        "b.md": "[link](x) and\n[[wiki]]",
        "c.txt": '["quoted"] words, then prose',
        "d.py": '{"a": 1}.items()\nprint()',
        "e.txt": "a, b, c\nd, e",
        "f.tex": "[\n\\begin{x}",
        "g.txt": "<3 and a < b",
    }
    for name, content in texts.items():
        (root / name).write_text(content)
    assert read(root)[0] == list(texts.values())
    markup = {"x.html": "<!DOCTYPE html><p>x", "y.txt": '<?xml version="1.0"?><a/>', "z": "\n<div class=a>x"}
    for name, content in markup.items():
        (root / name).write_text(content)
    (root / "package.json").write_text('{\n "name": "x"\n}\n')
    (root / "data.csv").write_text("a,b\n1,2\n")
    found, rejects, summary = read(root)
    assert len(found) == 10 and summary.kinds["markup"]["documents"] == 3
    assert "markup (HTML, XML), kept with all their tags: 3" in "\n".join(summary.lines())
    assert rejects == {"in/package.json:1": "no_text_field", "in/data.csv": "no_text_field"}
    found, rejects, summary = read(root, as_text=["*.json", "in/data.*", "*.html"])
    assert len(found) == 12 and not rejects and summary.kinds["markup"]["documents"] == 2


ROWS = [(i, f'"quoted, {i}" and {content[:9]!r}', 5) for i, content in enumerate(TEXTS)]


def of_columns(separator: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows([("id", "content", "stars"), *ROWS])
    return out.getvalue().encode()


LIKE_RECORDS = {
    "TSV without the column": of_columns("\t"),
    "CSV without the column": of_columns(","),
    "strings of JSON": b"".join(json.dumps(content).encode() + b"\n" for content in TEXTS),
    "arrays of JSON": b'["a", "first"]\n["b", "second"]',
    "Python": "".join(f"{record}\n" for record in RECORDS).encode(),
    "an index of Common Crawl": b'org,a)/ 20260101 {"url": "https://a.org/", "mime": "text/html"}\n' * 9,
    "an answer of a web server": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\ntext",
}


@pytest.mark.parametrize("name", LIKE_RECORDS)
def test_texts_that_look_like_records_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(LIKE_RECORDS[name])
    (tmp_path / "in" / "prose.txt").write_text(text(1, 40))
    texts, rejects, summary = read(tmp_path / "in", unicode_form="none", line_ends="keep")
    assert texts == [LIKE_RECORDS[name].decode(), text(1, 40)] and not rejects
    assert summary.kinds["text like records"]["documents"] == 1
    assert "many records (rows of a table, lines of values), each kept as one text: 1" in summary.lines()[-1]


def test_few_sources_look_like_records() -> None:
    """None of Python's own library."""
    paths = list(Path(json.__file__).parent.parent.glob("*/*.py"))
    kinds = [recognise(io.BytesIO(path.read_bytes()), path.name, "text").kind for path in paths]
    assert len(kinds) > 200 and "text like records" not in kinds


def test_little_that_became_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pages.warc.gz").write_bytes(responses("text/html", [content.encode() for content in TEXTS]))
    texts, rejects, summary = read(tmp_path / "pages.warc.gz")
    assert not texts and set(rejects.values()) == {"not_text"} and len(rejects) == 6
    assert "all inputs: 0 of" in str(summary.fault())
    mixed = Summary.from_json([{"kinds": {}, "changes": {}, "fields": {}}])
    for kind, size, became in (("text", 980, 980), ("Parquet", 20, 3)):
        mixed.begin(kind)
        mixed.add("bytes", size)
        mixed.add("text_bytes", became)
    assert "Parquet: 3 of 20 bytes became text (15.0%)" in str(mixed.fault())
    mixed.begin("Parquet")
    mixed.add("text_bytes", 1)
    assert mixed.fault() is None
    assert mixed.lines()[1:] == [
        "Parquet      2     20          0        20.0%",
        "text         1    980          0       100.0%",
    ]


def broken_json(draw: random.Random, record: dict[str, Any]) -> tuple[Any, str]:
    kinds: list[tuple[Any, str]] = [
        ({"id": record["id"]}, "no_text_field"),
        (record | {"text": 5}, "text_not_a_string"),
        (record | {"text": " "}, "empty"),
        (record | {"text": "a\0b"}, "nul_bytes"),
        ([1], "bad_json"),
    ]
    return draw.choice(kinds)


def corpora(root: Path) -> Iterator[tuple[Path, list[str], dict[str, str]]]:
    """Write a corpus of each kind with 1% broken documents; yield it, its good texts and its rejects."""
    draw = random.Random(0)
    count = 600
    good = [{"id": f"{i}", "text": text(i, 6)} for i in range(count)]
    bad = sorted(draw.sample(range(count), 8))
    values: list[Any] = list(good)
    rejects = {}
    for i in bad:
        values[i], reason = broken_json(draw, good[i])
        rejects[str(i) if isinstance(values[i], dict) else i + 1] = reason
    kept = [good[i]["text"] for i in range(count) if i not in bad]

    def written(name: str, content: bytes) -> tuple[Path, list[str], dict[str, str]]:
        (root / name).write_bytes(content)
        named = {key if isinstance(key, str) else f"{name}:{key}": reason for key, reason in rejects.items()}
        return root / name, kept, named

    yield written("lines", "\n".join(map(json.dumps, values)).encode())
    yield written("array.json", json.dumps(values, indent=1).encode())

    rejects.clear()
    rows = ["id,text"] + [f'{one["id"]},"{one["text"]}"' for one in good]
    for n, i in enumerate(bad):
        rows[i + 1] = (f'{i},"a"b', f"{i}", f"{i}, ")[n % 3]
        rejects.update({str(i): "empty"} if n % 3 == 2 else {i + 1: "bad_row"})  # type: ignore[dict-item]
    yield written("rows.csv", "\n".join(rows).encode())

    rejects.clear()
    members = {f"{one['id']}.txt": one["text"].encode() for one in good}
    for n, i in enumerate(bad):
        members[f"{i}.txt"] = (b"\xff", b" ", b"a\0b")[n % 3]
        rejects[f"texts:{i}"] = ("not_utf8", "empty", "nul_bytes")[n % 3]
    yield written("texts", tar(members))
    rejects = {key.replace("texts:", "texts.zip:"): reason for key, reason in rejects.items()}
    yield written("texts.zip", zipped(members))
    (root / "files").mkdir()
    for name, content in members.items():
        (root / "files" / f"{name.zfill(7)}").write_bytes(content)
    named = {f"files/{f'{i}.txt'.zfill(7)}": ("not_utf8", "empty", "nul_bytes")[n % 3] for n, i in enumerate(bad)}
    yield root / "files", kept, named

    contents = [members[f"{one['id']}.txt"] for one in good]
    reasons = [("not_utf8", "empty", "nul_bytes")[n % 3] for n in range(len(bad))]
    rejects = {i + 2: reason for i, reason in zip(bad, reasons, strict=True)}  # type: ignore[misc]
    yield written("a.arc", arc(contents))
    rejects = {f"<urn:{i}>": reason for i, reason in zip(bad, reasons, strict=True)}
    yield written("pages", responses("text/plain", contents))

    rejects = {str(i): "text_not_a_string" for i in bad}
    columns = pa.table(
        {"id": [r["id"] for r in good], "text": [None if i in bad else good[i]["text"] for i in range(count)]}
    )
    out = io.BytesIO()
    pq.write_table(columns, out)
    yield written("a.parquet", out.getvalue())
    out = io.BytesIO()
    with pa.ipc.new_stream(out, columns.schema) as writer:
        writer.write_table(columns)
    yield written("a.arrow", out.getvalue())

    rejects = {f"<urn:{i}>": ("not_utf8", "empty")[i % 2] for i in bad}
    out = io.BytesIO()
    warc = warcio.warcwriter.WARCWriter(out, gzip=True)
    for i, one in enumerate(good):
        payload = (b"\xff", b"")[i % 2] if i in bad else one["text"].encode()
        headers = {"WARC-Record-ID": f"<urn:{i}>"}
        record = warc.create_warc_record("", "conversion", io.BytesIO(payload), warc_headers_dict=headers)
        warc.write_record(record)
    yield written("a.wet", out.getvalue())


def test_one_percent_broken_of_every_kind(tmp_path: Path) -> None:
    for path, texts, rejects in corpora(tmp_path):
        for tasks in (1, 2):
            found = read(path, tasks)
            assert found[:2] == (texts, rejects), path.name
            assert found[2].fault() is None


def test_encodings(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    german = "Die Straße führt über die Brücke, “sagt” er.\n" * 20
    (root / "a.txt").write_bytes(german.encode("cp1252"))
    (root / "b.jsonl").write_bytes(json_lines([{"text": german}]).decode().encode("cp1252"))
    assert read(root, encoding="cp1252")[0] == [german, german]
    assert set(read(root)[1].values()) == {"not_utf8"}
    (root / "b.jsonl").unlink()
    (root / "b.json").write_bytes(json.dumps([{"text": german}], ensure_ascii=False).encode("utf-16"))
    (root / "c.txt").write_text(german)
    texts, rejects, summary = read(root, encoding="detect")
    assert texts[1:] == [german, german] and not rejects
    assert texts[0].count("ü") == german.count("ü")  # of encodings with the same letters any may be found
    assert "JSON (utf-16)" in summary.kinds and "text" in summary.kinds
    with pytest.raises(LookupError):
        read(root, encoding="klingon")
    (root / "a.txt").write_bytes(b"\x81")
    assert read(root / "a.txt", encoding="cp1252")[1] == {"a.txt": "not_utf8"}


def test_bytes_come_back_exactly(tmp_path: Path) -> None:
    strange = "\ufeffa\r\nb\rc\u037e Zu\u0308rich\u2028\n"
    (tmp_path / "a.txt").write_bytes(strange.encode())
    texts, _, summary = read(tmp_path / "a.txt", unicode_form="none", line_ends="keep")
    assert texts == [strange] and not summary.changes
    texts, _, summary = read(tmp_path / "a.txt")
    assert texts == ["a\nb\nc; Zürich\u2028\n"]
    assert summary.changes == {"line ends": 1, "NFC": 1, "byte order mark": 1}
    assert "NFC in 1" in summary.lines()[-1]


def test_large_json_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any border between two pieces gives what json.loads gives, and no piece grows beyond what a value needs."""
    content = json.dumps([*RECORDS, {"text": '\\u00e9"\\' * 30, "n": [1.5e10, True, None]}], indent=1)
    (tmp_path / "a.json").write_text(content)
    for size in (1, 7, 100, len(content) - 1):
        monkeypatch.setattr("data_prep.json_records.CHUNK", size)
        assert read(tmp_path / "a.json")[0] == [record["text"] for record in json.loads(content)]
    for cut in (5, 60, 300, len(content) - 1):
        (tmp_path / "a.json").write_text(content[:cut])
        texts, rejects, _ = read(tmp_path / "a.json")
        assert set(rejects.values()) == {"bad_json"} and texts == TEXTS[: len(texts)] + texts[6:]


def test_members_larger_than_a_document_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_BYTES", 1000)
    content = {"a.txt": b"m" * 1001, "b.txt": b"m" * 1000, "c.txt.gz": gzip.compress(b"m" * 1001)}
    for name, data in (("a.tar", tar(content)), ("a.zip", zipped(content))):
        (tmp_path / name).write_bytes(data)
        texts, rejects, _ = read(tmp_path / name)
        assert texts == ["m" * 1000]
        assert rejects == {f"{name}:a": "too_large", f"{name}:c": "too_large"}
