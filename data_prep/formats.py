"""Recognises by its first bytes what a file holds; its suffix decides only where these tell nothing."""

import codecs
import csv
import importlib.util
import json
import lzma
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BufferedReader, RawIOBase, TextIOWrapper
from pathlib import PurePath
from typing import IO, Any

import pyarrow

TEXT, MARKUP, LIKE_RECORDS, JSON_LINES, JSON, TABLE, PARQUET, ARROW, WARC, TAR, ZIP, METADATA = (
    "text",
    "markup",
    "text like records",
    "JSON lines",
    "JSON",
    "CSV/TSV",
    "Parquet",
    "Arrow",
    "WARC",
    "tar",
    "zip",
    "metadata",
)
RECORDS = {JSON_LINES, JSON, TABLE, PARQUET, ARROW, WARC, TAR, ZIP}  # formats of files that hold many documents

HEAD_BYTES = 1 << 16  # of the uncompressed content, from which a format is recognised
MAX_LAYERS = 3  # compressions around one another
COMPRESSIONS = {  # by the first bytes
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x5d\0\0": "xz",  # the format before xz, which is read alike
    b"\x04\x22\x4d\x18": "lz4",
}
SUFFIX_COMPRESSIONS = {"gz": "gzip", "tgz": "gzip", "zst": "zstd", "tzst": "zstd", "bz2": "bz2", "tbz2": "bz2"}
SUFFIX_COMPRESSIONS |= {"xz": "xz", "txz": "xz", "lzma": "xz", "lz4": "lz4"}
# The skippable frames with which pzstd and others begin a file of Zstandard; lz4 has the same.
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
SIGNATURES = {
    b"PAR1": PARQUET,
    b"ARROW1": ARROW,
    b"\xff\xff\xff\xff": ARROW,  # the stream format, in which `datasets` saves
    b"WARC/": WARC,
    b"filedesc://": WARC,  # ARC, the format before WARC
    b"PK\x03\x04": ZIP,
    b"PK\x05\x06": ZIP,  # without members
}
SUFFIXES = {  # of formats that only their own signature can confirm, or that have none
    "jsonl": JSON_LINES,
    "ndjson": JSON_LINES,
    "json": JSON,
    "csv": TABLE,
    "tsv": TABLE,
    "parquet": PARQUET,
    "arrow": ARROW,
    "warc": WARC,
    "arc": WARC,
    "wet": WARC,
    "tar": TAR,
    "tgz": TAR,
    "tzst": TAR,
    "tbz2": TAR,
    "txz": TAR,
    "zip": ZIP,
}
IDS = "token ids, not text: `prep import-tokens` reads them"
PACKED = "a packed archive: unpack it first"
NUMBERS = "numbers, not text"
OFFICE = "an Office document: save it as plain text first"
REFUSED = {  # by the first bytes: what it is and what to do
    b"%PDF-": "PDF: extract its text first, for instance with `pdftotext`",
    b"%!PS": "PostScript: extract its text first, for instance with `ps2ascii`",
    b"{\\rtf": "rich text: save it as plain text first",
    b"<mediawiki ": "a dump of MediaWiki: extract its articles with `wikiextractor --json`",
    b"<doc id=": "WikiExtractor's markup of many articles: run it again with `--json`",
    b"Obj\x01": "Avro: convert it to Parquet first",
    b"ORC": "ORC: convert it to Parquet first",
    b"FEA1": "Feather 1: convert it to Parquet first",
    b"PARE": "encrypted Parquet: decrypt it first",
    b"SQLite format 3\0": "a SQLite database: export its table as CSV first",
    b"\x89HDF\r\n\x1a\n": "HDF5: export its texts as JSON lines first",
    b"\x93NUMPY": f"a NumPy array of {NUMBERS}",
    b"MMIDIDX\0": f"Megatron's index of {IDS}",
    b"7z\xbc\xaf\x27\x1c": PACKED,
    b"Rar!\x1a\x07": PACKED,
    b"\x1f\x9d": "compressed by `compress`: unpack it first",
    b"LZIP": PACKED,
}
REFUSED_SUFFIXES = {
    "tfrecord": "TFRecord: export its texts as JSON lines first",
    "tfrecords": "TFRecord: export its texts as JSON lines first",
    "mds": "a shard of a MosaicML dataset (MDS): give the directory with its index.json",
    "ds": f"datatrove's file of {IDS}",
    "npz": f"NumPy arrays of {NUMBERS}",
    "docx": OFFICE,
    "odt": OFFICE,
    "xlsx": "an Office document: save it as CSV first",
    "epub": "an EPUB book: save it as plain text first, for instance with `pandoc -t plain`",
}
REFUSED_ZIPS = {  # by the name of the first member, if their own programs wrote them
    rb"(.*/)?data\.pkl": "a checkpoint of PyTorch, not text",
    rb".*\.npy": f"NumPy arrays of {NUMBERS}",
    rb"\[Content_Types\]\.xml|_rels/\.rels": OFFICE,
    rb"mimetype": "an EPUB book or an Office document: save it as plain text first, as with `pandoc -t plain`",
    rb"META-INF/(MANIFEST\.MF)?": "a program of Java, not text",
}
MARKUP_START = re.compile(r"\s*<(\?xml|!doctype|!--|[a-z][a-z0-9:-]*[\s>/])", re.IGNORECASE)
# A line that is a value of JSON or Python, or one after a key; the first line of an answer of a web server.
VALUE_LINE = re.compile(r"""(\{.*\}|\[.*\]|".*"|[^{]*\{\s*".*\}),?\s*""")
HTTP_START = re.compile(r"HTTP/\d[.\d]* \d{3}\b")
TABLE_LINES, MOST_LINES = 5, 40  # lines of a table at least, and lines that are looked at
JSON_START = re.compile(r'\{\s*["}]|\[\s*["{]')
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # before UTF-16, whose they contain
BYTE_ORDER_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class Format:
    """What a file holds."""

    kind: str  # one of the names above
    layers: tuple[str, ...] = ()  # its compressions, the outermost first
    refused: str | None = None  # why a file is not read and what to do instead
    separator: str = ","  # of the columns of a table
    encoding: str | None = None  # of a text, None for UTF-8


PLAIN_TEXT = Format(TEXT)


class Recoded(RawIOBase):
    """The UTF-8 of a stream in another encoding. Reading raises UnicodeError for bytes outside that encoding."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._text = TextIOWrapper(stream, encoding, newline="")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or self._text.read(1 << 14).encode()
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def uncompressed(
    stream: IO[bytes], layers: tuple[str, ...], encoding: str | None = None, buffer: int = 1 << 16
) -> IO[bytes]:
    """Return the content of a stream that is compressed in layers, with all of its members or frames, as UTF-8.

    Reading raises OSError, EOFError or lzma.LZMAError if the stream is broken or cut off.
    """
    for layer in layers:
        raw = lzma.open(stream) if layer == "xz" else pyarrow.CompressedInputStream(stream, layer)  # noqa: SIM115
        stream = BufferedReader(raw, buffer)  # type: ignore[arg-type]
    return BufferedReader(Recoded(stream, encoding), buffer) if encoding else stream


def encoding_named(name: str | None) -> str | None:
    """Return Python's name of an encoding; "detect" and None stay. Raises ValueError if there is no such encoding."""
    try:
        return name if name in (None, "detect") else codecs.lookup(name).name
    except LookupError:
        raise ValueError(f"encoding: found {name}, expected one that Python knows, or detect") from None


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether the path of a file, or its last part, matches one of the patterns."""
    return any(fnmatch(part, pattern) for part in (name, PurePath(name).name) for pattern in patterns)


def recognise(
    stream: IO[bytes], name: str, text_field: str, encoding: str | None = None, as_text: Sequence[str] = ()
) -> Format:
    """Tell what a stream holds, whatever it is called.

    Args:
        stream: the file, which is read from its current position.
        name: the file's path, from the input on.
        text_field: path of the text in a record, which tells a table from a text by its first line.
        encoding: that of texts, None for UTF-8, "detect" to find out.
        as_text: patterns of names of files that hold a text each, whatever they look like.

    Raises:
        OSError: the file cannot be read.
        ValueError: a package is missing.
    """
    start = stream.tell()
    layers: tuple[str, ...] = ()
    suffixes = [suffix.lower() for suffix in PurePath(name).name.split(".")[1:]]
    while True:
        stream.seek(start)
        head = _head(stream, layers)
        layer = _compression(head)
        if layer is None and not layers and suffixes and suffixes[-1] in SUFFIX_COMPRESSIONS:
            layer = SUFFIX_COMPRESSIONS[suffixes[-1]]  # a broken file, of which reading will say so
        if layer is None or len(layers) == MAX_LAYERS:
            break
        layers += (layer,)
    while suffixes and suffixes[-1] in SUFFIX_COMPRESSIONS and suffixes[-1] not in SUFFIXES:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    is_text = matches(name, as_text)
    binary = None if is_text else _binary(head, suffix, layers)
    if binary:
        if binary.kind == WARC:
            _require("warcio", "WARC files")
        return binary
    if encoding == "detect":
        encoding = _detected(head)
    if is_text:
        return Format(TEXT, layers, encoding=encoding)
    content = head.decode(encoding or "utf-8-sig", errors="replace").removeprefix("\ufeff")
    kind, separator = _kind_of_text(content, suffix, text_field)
    return Format(kind, layers, separator=separator, encoding=encoding)


def _binary(head: bytes, suffix: str, layers: tuple[str, ...]) -> Format | None:
    """Recognise a format by its signature; None for texts and what is unknown."""
    for signature, refused in REFUSED.items():
        if head.startswith(signature):
            return Format(TEXT, layers, refused)
    if head.startswith(b"PK\x03\x04"):
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        for pattern, refused in REFUSED_ZIPS.items():
            if re.fullmatch(pattern, first):
                return Format(TEXT, layers, refused)
    by_name = REFUSED_SUFFIXES.get(suffix.split("-")[0])  # one of several files is .tfrecord-00000-of-00512
    if by_name and (b"\0" in head or head.startswith(b"PK")):
        return Format(TEXT, layers, by_name)
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            return Format(kind, layers)
    if head[257:262] == b"ustar" or (suffix in SUFFIXES and SUFFIXES[suffix] not in (JSON_LINES, JSON, TABLE)):
        return Format(SUFFIXES.get(suffix, TAR), layers)  # where its signature is missing, reading will say so
    return None


def _kind_of_text(content: str, suffix: str, text_field: str) -> tuple[str, str]:
    """Return the kind of a text and the separator of its columns, if it is a table."""
    if of_json := _json_kind(content, suffix):
        return of_json, ","
    if separator := _separator(content, suffix, text_field):
        return TABLE, separator
    if MARKUP_START.match(content):
        return MARKUP, ","
    return LIKE_RECORDS if _looks_like_records(content) else TEXT, ","


def _looks_like_records(content: str) -> bool:
    """Tell whether a text is probably many records of a format that it does not name: values, or rows of a table."""
    if HTTP_START.match(content):
        return True
    *lines, last = content.split("\n", MOST_LINES)
    lines = [line.rstrip("\r") for line in lines if line.strip()]
    if len(lines) < TABLE_LINES and last.strip():  # of a short text; the last line of others may be cut off
        lines.append(last)
    if len(lines) > 1 and all(map(VALUE_LINE.fullmatch, lines)):
        return True
    if len(lines) < TABLE_LINES or any(line[0].isspace() for line in lines):
        return False
    for separator, cells in (("\t", 2), (",", 3), (";", 3), ("|", 3)):
        if min(lines[0].count(separator), lines[-1].count(separator)) >= cells - 1:  # most texts are not parsed
            try:
                if len({len(row) for row in csv.reader(lines, delimiter=separator, strict=True)}) == 1:
                    return True
            except csv.Error:
                pass
    return False


def _detected(head: bytes) -> str | None:
    """Guess the encoding of a text from its first bytes; None for UTF-8."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return None
    except UnicodeDecodeError:
        _require("charset_normalizer", "--encoding detect")
        import charset_normalizer

        best = charset_normalizer.from_bytes(head).best()
        return best.encoding if best else None


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what}: the package {package} is missing: pip install 'infini-train[formats]'")


def _head(stream: IO[bytes], layers: tuple[str, ...]) -> bytes:
    """Return the first bytes below some layers of compression, as far as they can be read."""
    head = b""
    opened = uncompressed(stream, layers, buffer=1024)  # small, so that little is lost before a file that is cut off
    while len(head) < HEAD_BYTES:
        try:
            more = opened.read(1024 if layers else HEAD_BYTES)
        except (OSError, EOFError, lzma.LZMAError):
            if not layers:
                raise
            break
        if not more:
            break
        head += more
    return head


def _compression(head: bytes) -> str | None:
    if SKIPPABLE.match(head):
        length = 8 + int.from_bytes(head[4:8], "little")
        return _compression(head[length:]) or "zstd"
    return next((layer for magic, layer in COMPRESSIONS.items() if head.startswith(magic)), None)


def _json_kind(content: str, suffix: str) -> str | None:
    """Tell JSON lines from other JSON; None if it is neither."""
    if suffix in ("jsonl", "ndjson"):
        return JSON_LINES
    content = content.lstrip()
    if not JSON_START.match(content):
        return JSON if suffix == "json" else None
    try:
        value, end = json.JSONDecoder().raw_decode(content)
    except (ValueError, RecursionError):  # broken, or cut off after the first bytes of the file
        is_lines = content[0] == "{" and ("\n" not in content or any(map(_is_record, content.split("\n")[:100])))
        return JSON_LINES if is_lines else JSON
    follows = content[end:].lstrip()[:1]
    if suffix != "json" and follows not in (("", "{") if isinstance(value, dict) else ("",)):
        return None  # a text that only begins like JSON
    alone = content[end:].partition("\n")[0].strip() == ""  # on its line
    return JSON_LINES if isinstance(value, dict) and alone and "\n" not in content[:end] else JSON


def _is_record(line: str) -> bool:
    try:
        return line.startswith("{") and bool(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _separator(content: str, suffix: str, text_field: str) -> str | None:
    """Return what separates the columns of a table; None for a file that neither its name nor a column makes one."""
    first = content.split("\n", 1)[0].rstrip("\r")
    for separator in "\t,;|":
        if text_field in (cells := first.replace('"', "").split(separator)) and len(cells) > 1:
            return separator
    return {"tsv": "\t", "csv": ","}.get(suffix)
