"""Encodes text as sentencepiece ids. Shards and exported tokenizers, which include this file, both use it."""

from collections.abc import Iterator
from itertools import chain

import sentencepiece

SPACE_MARK = "\u2581"  # the character that sentencepiece uses for a space
# Minimum characters for one call of sentencepiece, which gets whole lines; the tokens are those of the whole text.
# 300 is the fastest of 1 to 10,000: 3.3 M characters/s for books and 4.0 M for C code on one core (whole documents
# 1.0 M and 2.7 M, single lines 3.3 M and 3.0 M).
CHUNK_CHARACTERS = 300


def _chunks(text: str) -> Iterator[str]:
    """Split a text at ends of lines into chunks of at least CHUNK_CHARACTERS."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + CHUNK_CHARACTERS) + 1 or len(text)
        yield text[start:end]
        start = end


class TextEncoder:
    """Encodes text without BOS and EOS. Models like those that we train decode the ids to exactly the same text."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor
        self._mark = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        # Whether decoding can restore any text: the model has byte pieces, changes no white space, and does not put
        # a space before a text.
        probe = "a  b\n\t c \r\n\n"
        pieces = processor.encode(probe, out_type=str)
        has_bytes = processor.unk_id() not in self._mark
        self._is_identity = has_bytes and pieces[0][0] != SPACE_MARK and processor.decode(pieces) == probe
        # Whether lines can be encoded separately: no piece contains a newline, so newlines are encoded as bytes.
        self._line_by_line = self._is_identity and not any(
            "\n" in processor.id_to_piece(i) for i in range(processor.vocab_size())
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        chunks = _chunks(text) if self._line_by_line else [text]
        return list(chain.from_iterable(self._encode_chunk(chunk) for chunk in chunks))

    def _encode_chunk(self, text: str) -> list[int]:
        """Encode a chunk. A space mark in the text is encoded as bytes, so that it is not decoded as a space."""
        if SPACE_MARK not in text or not self._is_identity:
            return self._processor.encode(text)
        first, *others = (self._processor.encode(part) for part in text.split(SPACE_MARK))
        return list(chain(first, *(self._mark + part for part in others)))
