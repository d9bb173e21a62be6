"""Checks and normalises the text of a document chunk by chunk, so that a text of any length needs little memory."""

import codecs
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal

from data_prep.found import UNREADABLE
from data_prep.summary import Summary

CHUNK = 1 << 20  # characters that are normalised at once, about; a text that is not longer is held whole

UnicodeForm = Literal["NFC", "NFKC", "none"]
LineEnds = Literal["lf", "keep"]


class BadText(ValueError):
    """A text that is left out; `reason` and `detail` are those of a Reject."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class LongText:
    """A text that is read as it is iterated over, once, in parts of any size. The iteration may raise BadText."""

    def __init__(self, parts: Iterator[str]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[str]:
        return self._parts


class TextReader:
    """Makes the texts of documents.

    Args:
        unicode_form: normalisation; "none" also keeps a byte order mark.
        line_ends: "lf" makes all line ends \\n, "keep" leaves them as they are.
        max_bytes: of a text; a longer one is left out.
        summary: counts the texts that were read to their ends without a fault, their bytes and what was changed.
    """

    def __init__(self, unicode_form: UnicodeForm, line_ends: LineEnds, max_bytes: int, summary: Summary) -> None:
        self.unicode_form, self.line_ends = unicode_form, line_ends
        self.max_bytes, self.summary = max_bytes, summary

    def text_of(self, content: str | bytes | Iterator[bytes]) -> str | LongText:
        """Return the text of a document: a string, unless it is longer than CHUNK.

        Raises:
            BadText: the text is left out. A LongText raises it when it is iterated over.
        """
        changes: set[str] = set()
        if isinstance(content, bytes):
            content = "".join(self._decoded((content,), changes))
        if isinstance(content, str) and len(content) <= CHUNK:
            size = self._checked(content, 0)
            self._check_size(size)
            self._end(size, content.isspace() or not content)
            text = self._in_form(self._with_line_ends(content, changes), changes)
            self.summary.changes.update(changes)
            return text
        chunks = _slices(content) if isinstance(content, str) else self._decoded(content, changes)
        return LongText(self._normalised(self._all_checked(chunks), changes))

    def line_of(self, content: str) -> str:
        """Return a short text that is put before one, in the form of texts. Raises BadText."""
        self._checked(content, 0)
        return self._in_form(self._with_line_ends(content, set()), set())

    def _decoded(self, content: Iterable[bytes], changes: set[str]) -> Iterator[str]:
        """Decode UTF-8 without a byte order mark. Raises BadText, also for what iterating over `content` raises."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        size = done = 0  # bytes that were read, and that were decoded
        try:
            for part in chain(content, [b""]):
                size += len(part)
                self._check_size(size)
                text = decoder.decode(part, final=not part)
                if not done and text.startswith("\ufeff") and self.unicode_form != "none":
                    text = text[1:]
                    changes.add("byte order mark")
                done = size - len(decoder.getstate()[0])
                if text:
                    yield text
        except UnicodeDecodeError as error:
            found = error.object[error.start]
            detail = f"byte 0x{found:02x} in position {done + error.start:,}: {error.reason} (see --encoding)"
            raise BadText("not_utf8", detail) from None
        except UnicodeError as error:  # of a file in another encoding
            raise BadText("not_utf8", str(error)) from None
        except UNREADABLE as error:
            raise BadText("unreadable", str(error)) from None

    def _check_size(self, size: int) -> None:
        """Raise BadText if so many bytes are too many."""
        if size > self.max_bytes:
            raise BadText("too_large", f"more than {self.max_bytes:,} bytes")

    def _all_checked(self, chunks: Iterator[str]) -> Iterator[str]:
        """Pass a text on if it is fit for a document, and count it at its end. Raises BadText."""
        size = position = 0
        blank = True
        for chunk in chunks:
            size += self._checked(chunk, position)
            self._check_size(size)
            position += len(chunk)
            blank = blank and chunk.isspace()
            yield chunk
        self._end(size, blank)

    def _checked(self, chunk: str, position: int) -> int:
        """Return the bytes of a chunk, which begins at this position of its text. Raises BadText."""
        try:
            size = len(chunk.encode())  # fails for half of a surrogate pair, which JSON escapes can contain
        except UnicodeEncodeError as error:
            raise BadText("not_utf8", str(error)) from None
        if (at := chunk.find("\0")) >= 0:
            raise BadText("nul_bytes", f"first at character {position + at:,}: probably not text")
        return size

    def _end(self, size: int, blank: bool) -> None:
        """Count a text that was checked to its end. Raises BadText if it holds nothing."""
        if blank:
            raise BadText("empty", "")
        self.summary.add("documents", 1)
        self.summary.add("text_bytes", size)

    def _normalised(self, chunks: Iterator[str], changes: set[str]) -> Iterator[str]:
        """Change line ends and characters as if the text were one string, and count what was changed at its end."""
        held: list[str] = []  # ends in what the next chunk may change
        chunk = next(chunks, None)
        while chunk is not None:
            following = next(chunks, None)
            if following and self.line_ends == "lf" and chunk.endswith("\r"):
                chunk, following = chunk[:-1], "\r" + following
            chunk = self._with_line_ends(chunk, changes)
            if following is None:
                yield self._in_form("".join([*held, chunk]), changes)
            elif self.unicode_form == "none":
                yield chunk
            elif at := _last_start(chunk):
                yield self._in_form("".join([*held, chunk[:at]]), changes)
                held = [chunk[at:]]
            else:
                held.append(chunk)
            chunk = following
        self.summary.changes.update(changes)

    def _with_line_ends(self, text: str, changes: set[str]) -> str:
        if self.line_ends == "keep" or "\r" not in text:
            return text
        changes.add("line ends")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _in_form(self, text: str, changes: set[str]) -> str:
        if self.unicode_form == "none" or unicodedata.is_normalized(self.unicode_form, text):
            return text
        changes.add(self.unicode_form)
        return unicodedata.normalize(self.unicode_form, text)


def _slices(text: str) -> Iterator[str]:
    return (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))


def _last_start(text: str) -> int:
    """Return the last position where a text can be normalised in two parts; 0 if there is none.

    A part that is normalised by itself must not begin with a mark, or a jamo of Hangul, that may be composed with the
    character before it.
    """
    return next((at for at in range(len(text) - 1, 0, -1) if starts_anew(text[at])), 0)


def starts_anew(character: str) -> bool:
    """Tell whether normalising changes a character and what comes before it independently of one another."""
    first = unicodedata.normalize("NFKD", character)[0]
    if unicodedata.category(first)[0] == "M" or "\u1100" <= first <= "\u11ff":
        return False
    return first <= "\uffff"  # beyond these characters there are letters that are composed, too
