"""Reads records of JSON: one a line, or objects in any layout."""

import json
import re
from collections.abc import Iterator
from io import TextIOWrapper
from typing import IO, Any

from data_prep.found import Found
from data_prep.summary import Summary

CHUNK = 1 << 20  # characters of JSON that are parsed at once, at least
NEAR_END = 16  # JSON that is cut off inside a literal or an escape fails at most so many characters before the cut
BETWEEN_VALUES = re.compile(r"[\s,]*")


def read_json_lines(stream: IO[bytes], name: str, max_bytes: int, summary: Summary) -> Iterator[Found]:
    """Read a record of each line, of at most `max_bytes`; blank lines are skipped."""
    number = 0
    while line := stream.readline(max_bytes + 1):
        number += 1
        location = f"{name}:{number}"
        summary.add("bytes", len(line))
        if len(line) > max_bytes:
            yield Found(location, wrong=("too_large", f"a line of more than {max_bytes:,} bytes"))
            while line and not line.endswith(b"\n"):
                line = stream.readline(max_bytes)
                summary.add("bytes", len(line))
        elif not line.isspace():
            try:  # as json.loads does it; but then a long line would stay in memory
                text = line.decode("utf-8", "surrogatepass").removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                yield Found(location, wrong=("not_utf8", str(error)))
                continue
            line = b"-"
            found = _parsed(text, location)
            text = ""
            yield found


def read_json(stream: IO[bytes], name: str, max_bytes: int, summary: Summary) -> Iterator[Found]:
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
                if ended or not cut_off or len(buffer) - position > max_bytes:
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
                summary.add("bytes", len(more.encode(errors="surrogateescape")))
            return
        more = text.read(max(CHUNK, len(buffer) - position))
        summary.add("bytes", len(more.encode(errors="surrogateescape")))
        buffer, position, ended = buffer[position:] + more, 0, not more


def _parsed(line: str, location: str) -> Found:
    try:
        return _record(json.loads(line), location)
    except (ValueError, RecursionError) as error:
        return Found(location, wrong=("bad_json", str(error)))


def _record(value: Any, location: str) -> Found:
    if isinstance(value, dict):
        return Found(location, value)
    return Found(location, wrong=("bad_json", f"a {type(value).__name__}, not an object"))
