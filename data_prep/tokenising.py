"""Tokenises a document piece by piece, so that neither its tokens nor the tokenizer's work need much memory."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from infini_train.files import DIGEST_BYTES
from infini_train.tokenizer.loading import Tokenizer


class Ends(NamedTuple):
    """Both ends of a text. The tokens between them stay the same when the text is joined with others."""

    head: str  # the whole text, if it cannot be cut
    head_tokens: int
    tail: str | None  # None if the text cannot be cut
    tail_tokens: int


class TokenisedText:
    """Iterates, once, over the tokens of a document: `BOS tokens EOS`, in arrays of the tokenizer's dtype.

    Args:
        text: the text, or parts of it.
        tokenizer: encodes the text.
        joins: whether the text may be joined with others, so that its ends are needed.

    Attributes:
        digest: digest of the whole text, hexadecimal (files.digest_of), when all tokens were read.
        ends: the ends of the text, if it may be joined with others, when all tokens were read.
    """

    digest: str
    ends: Ends | None = None

    def __init__(self, text: str | Iterable[str], tokenizer: Tokenizer, joins: bool):
        self._text = text
        self._tokenizer, self._joins = tokenizer, joins

    def __iter__(self) -> Iterator[np.ndarray]:
        tokenizer = self._tokenizer
        cut = self._joins and not tokenizer.is_seamless
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        ids, ends = [tokenizer.bos_id], list[tuple[str, int]]()
        for number, piece in enumerate(tokenizer.pieces(self._text, edges=cut)):
            digest.update(piece.encode())
            encoded = tokenizer.encode_piece(piece, number > 0)
            if cut:
                ends = [*ends[:1], (piece, len(encoded))]  # of the first and the last piece
            if number:  # a short document is one array
                yield np.array(ids, tokenizer.dtype)
                ids = []
            ids += encoded
        yield np.array([*ids, tokenizer.eos_id], tokenizer.dtype)
        self.digest = digest.hexdigest()
        if cut:
            head, *tails = ends or [("", 0)]
            self.ends = Ends(*head, *(tails[0] if tails else (None, 0)))
        elif self._joins:
            self.ends = Ends("", 0, "", 0)
