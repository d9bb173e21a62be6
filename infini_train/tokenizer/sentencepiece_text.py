"""Encodes text as sentencepiece ids. Shards and exported tokenizers, which include this file, both use it."""

from collections.abc import Iterator
from itertools import chain

import sentencepiece

SPACE_MARK = "\u2581"  # the character that sentencepiece uses for a space
# Minimum characters for one call of sentencepiece, which gets whole lines; the tokens are those of the whole text.
# 300 is the fastest of 1 to 10,000: 3.3 M characters/s for books and 4.0 M for C code on one core (whole documents
# 1.0 M and 2.7 M, single lines 3.3 M and 3.0 M).
CHUNK_CHARACTERS = 300


class TextEncoder:
    """Encodes text without BOS and EOS. Models like those that we train decode the ids to exactly the same text."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor
        self._mark = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        # Whether decoding can restore any text: the model has byte pieces, changes no white space, and does not put
        # a space before a text.
        probe = "a  b\n\t c \r\n\n"
        pieces = processor.encode(probe, out_type=str)
        restores = processor.unk_id() not in self._mark and processor.decode(pieces) == probe
        self._is_identity = restores and pieces[0][0] != SPACE_MARK
        # Text that follows other text is encoded behind this one, whose ids are removed, if the model would otherwise
        # put a space before it or remove one.
        self._before = max(("", "\n", "a"), key=self._follows_well)
        # Whether lines can be encoded separately: no piece contains a newline, so newlines are encoded as bytes.
        size = processor.vocab_size()
        self.line_by_line = (
            restores
            and not any("\n" in processor.id_to_piece(i) for i in range(size))
            and self._plain("a \n") + self._plain(" b", self._before) == self._plain("a \n b")
        )
        # Unigram models add up scores in float32, and rounding decides between equally good tokens. Lines are then
        # encoded one by one, so that the tokens of a line do not depend on those around it.
        self.is_exact = all(processor.get_score(i).is_integer() for i in range(size))
        self._chunk_characters = CHUNK_CHARACTERS if self.is_exact else 0

    @property
    def is_seamless(self) -> bool:
        """Whether the ids of a text are the same when it follows a newline or comes before one."""
        return self._is_identity and self.line_by_line

    def encode(self, text: str, follows: bool = False) -> list[int]:
        """Return the ids of a text, or, if it `follows` other text, those that it adds to the other text's ids."""
        if not self.line_by_line:
            return self._encode_chunk(text, follows)
        ids: list[int] = []
        for chunk in self._chunks(text):
            ids += self._encode_chunk(chunk, follows)
            follows = True
        return ids

    def _chunks(self, text: str) -> Iterator[str]:
        """Split a text at ends of lines into chunks of at least so many characters."""
        start = 0
        while start < len(text):
            end = text.find("\n", start + self._chunk_characters) + 1 or len(text)
            yield text[start:end]
            start = end

    def _encode_chunk(self, text: str, follows: bool) -> list[int]:
        """Encode a chunk. A space mark in the text is encoded as bytes, so that it is not decoded as a space."""
        if SPACE_MARK not in text or not self._is_identity:
            return self._plain(text, self._before if follows else "")
        first, *others = (self._plain(part) for part in text.split(SPACE_MARK))
        return list(chain(first, *(self._mark + part for part in others)))

    def _follows_well(self, before: str) -> int:
        """Count the probes, of two, whose second half behind `before` has the ids that it has in the whole probe."""
        probes = [("ab", " cd\nef"), ("ab", ".cd")]
        return sum(
            self._plain(first) + self._plain(second, before) == self._plain(first + second)
            for first, second in probes
        )

    def _plain(self, text: str, before: str = "") -> list[int]:
        """Return sentencepiece's ids of a text, as they are behind the text `before`."""
        if not before:
            return self._processor.encode(text)
        return self._processor.encode(before + text)[len(self._processor.encode(before)) :]
