"""Reads the texts of crawls: WARC and ARC files."""

from collections.abc import Iterator
from typing import IO

from data_prep.found import Found
from data_prep.summary import Summary

# Types of WARC records; arc_header is warcio's name of the first record of an ARC file.
PAGES = ("response", "resource")
WITHOUT_TEXT = ("warcinfo", "request", "metadata", "revisit", "continuation", "arc_header")


def read_warc(stream: IO[bytes], name: str, summary: Summary) -> Iterator[Found]:
    """Read the records of extracted text (`conversion`, as in WET files) and those of pages of plain text."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    number = errors = 0
    archive = ArchiveIterator(stream)
    try:
        for record in archive:
            number += 1
            location = f"{name}:{number}"
            if archive.err_count > errors:  # warcio only warns of it, and looks for the next record
                errors = archive.err_count
                detail = "the record before has another length than it says: records may be missing"
                yield Found(location, wrong=("unreadable", detail))
            content = record.content_stream().read()
            summary.add("bytes", len(content))
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
            elif record.rec_type not in WITHOUT_TEXT:
                yield Found(location, about, wrong=("unreadable", f"a record of the unknown type {record.rec_type}"))
    except ArchiveLoadFailed as error:
        detail = f"{str(error).strip()}; this file is not read beyond here"
        yield Found(f"{name}:{number + 1}", wrong=("unreadable", detail))
