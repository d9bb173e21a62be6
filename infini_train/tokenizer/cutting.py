"""Cuts a text where the ids of its pieces, one after the other, are those of the whole text.

A text of any length is then encoded in little memory, and the ids depend on the text alone, not on how it was read.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

PIECE = 8192  # a piece has at least so many characters, unless it is the last; larger ones are slower
LIMIT = 1 << 17  # a piece has at most so many characters, or twice its least number if that is more
CONTEXT = 64  # characters on both sides of a place that are encoded to see whether the text can be cut there
EDGE = 4096  # characters at both ends of a text in which `cut_edges` looks for places
ATTEMPTS = 32  # places of a kind that are tried
# Where a text may be cut, best first. Pre-tokenizers split at most ends of words, and no token goes on after them.
PLACES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?<=[^\W_])(?=[ \n])",  # the end of a word before a space or a line end
        r"(?<=\S\n)(?=\S)",  # the start of a line
        r"(?<=[^\W_])(?=[^\w\s])",  # the end of a word before punctuation
        r"(?<=[^\W\d_])(?=\d)",  # a digit after a letter
    )
)
LINE_START = re.compile(r"(?<=\n)")  # for tokenizers that are known to encode each line by itself
ANYWHERE = re.compile(r"(?s)(?=.)")

Encode = Callable[[str, bool], list[int]]  # gives the ids of a text, and is told whether it follows other text


def cut_text(
    text: str | Iterable[str], encode: Encode, places: Sequence[re.Pattern[str]] = PLACES, least: int = 0
) -> Iterable[str]:
    """Cut a text into pieces.

    Args:
        text: the text, or parts of it of any size.
        encode: gives the ids of a piece.
        places: where the text may be cut, best first.
        least: characters of a piece, at least; 0 for PIECE.

    Returns:
        The pieces, of which only a text without characters has none. They depend on the text alone.
        If a text goes on to the limit of a piece without any place, as when one letter is repeated, it is cut all the
        same, which may change the tokens on both sides of the cut.
    """
    least = least or PIECE
    if isinstance(text, str) and len(text) <= least:  # as `_cut` does, but faster
        return (text,) if text else ()
    return _cut((text,) if isinstance(text, str) else text, encode, places, least)


def _cut(chunks: Iterable[str], encode: Encode, places: Sequence[re.Pattern[str]], least: int) -> Iterator[str]:
    limit = max(LIMIT, 2 * least)
    text, start = "", 0
    parts = iter(chunks)
    ended = False
    while True:
        while not ended and len(text) - start < limit + CONTEXT:
            if (part := next(parts, None)) is None:
                ended = True
            else:
                text, start = text[start:] + part, 0
        if len(text) - start <= least:
            break
        near, far = (min(start + size, len(text)) for size in (2 * least, limit))
        end = (
            find_cut(text, start + least, near, encode, places)
            or find_cut(text, near, far, encode, places)
            or (far if far == len(text) else find_cut(text, far - EDGE, far, encode, [ANYWHERE]) or far)
        )
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def cut_edges(pieces: Iterable[str], encode: Encode, places: Sequence[re.Pattern[str]] = PLACES) -> Iterator[str]:
    """Cut a short piece off the start and another off the end of a text in pieces, as `cut_text` returns them.

    Between them, the ids stay the same when other text is put before or after this text.
    """
    iterator = iter(pieces)
    piece = next(iterator, "")
    if head := find_cut(piece, 1, EDGE, encode, places):
        yield piece[:head]
        piece = piece[head:]
    for following in iterator:
        yield piece
        piece = following
    if tail := find_cut(piece, max(1, len(piece) - EDGE), len(piece), encode, places, last=True):
        yield piece[:tail]
        piece = piece[tail:]
    if piece:
        yield piece


def find_cut(
    text: str, start: int, end: int, encode: Encode, places: Sequence[re.Pattern[str]], *, last: bool = False
) -> int | None:
    """Return the first position of a text, from `start` to `end`, where it can be cut, or the last; None if none."""
    for place in places:
        found = (match.start() for match in place.finditer(text, start, end))
        for at in islice(reversed(list(found)) if last else found, ATTEMPTS):
            left, right = text[max(0, at - CONTEXT) : at], text[at : at + CONTEXT]
            if place is LINE_START or encode(left + right, False) == encode(left, False) + encode(right, True):
                return at
    return None
