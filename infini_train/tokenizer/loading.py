"""Loads the tokenizers that encode documents: sentencepiece models and Hugging Face's tokenizer.json."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from infini_train.files import atomic_file
from infini_train.tokenizer.cutting import LINE_START, PLACES, cut_edges, cut_text
from infini_train.tokenizer.sentencepiece_text import SPACE_MARK, TextEncoder

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
RESERVED_TOKENS = 3 + 256  # the first ids of every tokenizer that we train: unknown, BOS, EOS and the bytes
# Texts that tokenizers are known to change: white space, line ends, capitals, composed and rare characters.
ROUND_TRIPS = (
    "one\ntwo\n",
    " a  b\t c",
    "a\r\nb",
    "Zu\u0308rich \u037e \uff21",
    "\U0001f600 \u4e2d",
    "It 's a test .",
)
ROUNDED_PIECE = 1 << 19  # characters of a piece, at least, for unigram models that do not encode by lines
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # a line of a file of tiktoken: bytes in base64, and a rank
TEKKEN = re.compile(rb'\s*\{\s*"(config|vocab|special_tokens)"')
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer(ABC):
    """What a dataset needs of a tokenizer. Special tokens that a text spells out are encoded as text."""

    path: Path
    file: str  # name of the main file, of which `sha256` is
    files: dict[str, bytes]  # names and contents of all files that a dataset keeps
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int  # the tokenizer's own pad token, else the unknown token, else EOS

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal sha256 of the main file, which identifies the tokenizer."""
        return hashlib.sha256(self.files[self.file]).hexdigest()

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smaller of uint16 and uint32 that holds all ids."""
        return np.uint16 if self.vocab_size <= 65536 else np.uint32

    def encode(self, text: str) -> np.ndarray:
        """Return BOS, the tokens of `text` and EOS in an array of `dtype`."""
        pieces = (self.encode_piece(piece, number > 0) for number, piece in enumerate(self.pieces(text)))
        return np.fromiter(chain([self.bos_id], chain.from_iterable(pieces), [self.eos_id]), self.dtype)

    def pieces(self, text: str | Iterable[str], edges: bool = False) -> Iterable[str]:
        """Cut a text into pieces, so that encoding one after the other gives the ids of the whole text.

        Args:
            text: the text, or parts of it of any size, on which the pieces do not depend.
            edges: cut the ends off as well (see `cut_edges`), for text that is joined with other text.
        """
        pieces = cut_text(text, self.encode_piece, self.places, self.least_piece)
        return cut_edges(pieces, self.encode_piece, self.places) if edges else pieces

    def changed_example(self) -> str | None:
        """Return an example of a text that decoding does not give back, None if none of the usual ones is."""
        for text in ROUND_TRIPS:
            if (found := self.decode(self.encode(text)[1:-1])) != text:
                return f"{text!r} becomes {found!r}"
        return None

    @cached_property
    def bytes_V(self) -> np.ndarray:
        """The number of UTF-8 bytes that each token encodes, int64 [vocab_size]; 0 for special tokens."""
        return np.array([self._bytes(i) for i in range(self.vocab_size)], np.int64)

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files to a directory."""
        for name, content in self.files.items():
            with atomic_file(directory / name) as f:
                f.write(content)

    @abstractmethod
    def decode(self, tokens: np.ndarray) -> str:
        """Return the text of the tokens."""

    @property
    def places(self) -> Sequence[re.Pattern[str]]:
        """Where a text may be cut, best first."""
        return PLACES

    @property
    def least_piece(self) -> int:
        """Characters of a piece, at least; 0 for the default."""
        return 0

    @property
    def is_seamless(self) -> bool:
        """Whether the ids of a text are the same when it follows a newline or comes before one."""
        return False

    @abstractmethod
    def encode_piece(self, text: str, follows: bool) -> list[int]:
        """Return the ids of a piece of a text; `follows` tells whether other text comes before it."""

    @abstractmethod
    def _bytes(self, token: int) -> int: ...


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a tokenizer.json, a directory that holds one, or a sentencepiece model.

    Raises:
        FileNotFoundError: `path`, or a file beside it that is needed, does not exist.
        ValueError: the file is not a tokenizer with BOS and EOS.
    """
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {path} does not exist: train one with `infini-train prep tokenizer`")
    if path.is_dir() or path.name == JSON:
        return HuggingFaceTokenizer(path / JSON if path.is_dir() else path)
    return SentencePieceTokenizer(path)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with BOS and EOS. Raises ValueError for a file that is not one."""

    file = MODEL

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {MODEL: path.read_bytes()}
        try:
            if not self.files[MODEL]:
                raise RuntimeError("an empty file")
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.files[MODEL])
        except RuntimeError:
            if TIKTOKEN.match(self.files[MODEL]) or TEKKEN.match(self.files[MODEL]):
                raise ValueError(
                    f"tokenizer {path} is of tiktoken or tekken: `infini-train prep convert-tokenizer` makes a "
                    "directory of it that can be given instead"
                ) from None
            raise ValueError(f"tokenizer {path} is not a sentencepiece model, and is not named {JSON}") from None
        self.vocab_size = self.processor.vocab_size()
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"tokenizer {path} needs both BOS and EOS, its ids are {self.bos_id} and {self.eos_id}: documents "
                f"are stored as BOS tokens EOS. For a model without BOS, such as T5's, give its {JSON}, with which "
                "EOS also serves as BOS"
            )
        pad_id = self.processor.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.processor.unk_id()  # every sentencepiece model has the latter
        self._encoder = TextEncoder(self.processor)

    def decode(self, tokens: np.ndarray) -> str:
        return self.processor.decode(tokens.tolist())

    @property
    def places(self) -> Sequence[re.Pattern[str]]:
        return (LINE_START, *PLACES) if self._encoder.line_by_line else PLACES

    @property
    def least_piece(self) -> int:
        # With rounded scores, equally good tokens depend on the text before: most texts are encoded at once.
        return 0 if self._encoder.line_by_line or self._encoder.is_exact else ROUNDED_PIECE

    @property
    def is_seamless(self) -> bool:
        return self._encoder.is_seamless

    def encode_piece(self, text: str, follows: bool) -> list[int]:
        return self._encoder.encode(text, follows)

    def _bytes(self, token: int) -> int:
        if self.processor.is_byte(token):
            return 1
        if self.processor.is_control(token) or self.processor.is_unknown(token):
            return 0
        return len(self.processor.id_to_piece(token).replace(SPACE_MARK, " ").encode())


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, used unchanged; tokenizer_config.json beside it names BOS and EOS.

    A tokenizer with only EOS, such as GPT-2's, uses it as BOS too. Raises FileNotFoundError for missing files and
    ValueError for files that are not such a tokenizer.
    """

    file = JSON

    def __init__(self, path: Path) -> None:
        self.path = path
        config_path = path.with_name(CONFIG)
        for needed in (path, config_path):
            if not needed.is_file():
                raise FileNotFoundError(f"tokenizer {path}: {needed} does not exist, expected {JSON} and {CONFIG}")
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises no narrower type
            raise ValueError(f"tokenizer {path} is not a Hugging Face tokenizer: {error}") from None
        try:
            config = json.loads(config_path.read_bytes())
            self.eos_token = eos = _token(config["eos_token"])
            self.bos_token = bos = _token(config.get("bos_token") or eos)
            padding = [_token(config[name]) for name in ("pad_token", "unk_token") if config.get(name)]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{config_path} names no eos_token; if the tokenizer has one by default, write it there with "
                "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`"
            ) from None
        vocabulary = self._tokenizer.get_vocab()
        for name, token in (("bos_token", bos), ("eos_token", eos)):
            if token not in vocabulary:
                raise ValueError(f"{config_path}: {name} is {token!r}, which is not in the vocabulary of {path}")
        self.bos_id, self.eos_id = vocabulary[bos], vocabulary[eos]
        self.pad_token = next((token for token in padding if token in vocabulary), eos)
        self.pad_id = vocabulary[self.pad_token]
        self.vocab_size = max(vocabulary.values()) + 1
        # A dataset does not keep the code that auto_map names.
        config = {name: value for name, value in config.items() if name != "auto_map"}
        config |= {"tokenizer_class": "TokenizersBackend", "bos_token": bos, "eos_token": eos}
        self.files = {JSON: content, CONFIG: json.dumps(config, indent=1).encode() + b"\n"}

        self._tokenizer.no_truncation()  # tokenizer.json may enable truncation and padding
        self._tokenizer.no_padding()
        self._tokenizer.add_special_tokens([bos, eos])  # tokenizer.json may list them as ordinary added tokens
        if {self.bos_id, self.eos_id} & set(self.encode_piece(f"{bos} {eos}{bos}", False)):
            raise ValueError(f"tokenizer {path} encodes {bos!r} or {eos!r} in a text as BOS or EOS")

    def decode(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens.tolist())

    def encode_piece(self, text: str, follows: bool) -> list[int]:
        tokenizer = self._following if follows else self._tokenizer
        tokenizer.encode_special_tokens = True  # special tokens as text; pickling does not keep this flag
        # encode_batch_fast computes no offsets, which makes it twice as fast as encode.
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    @cached_property
    def _following(self) -> tokenizers.Tokenizer:
        """The tokenizer for text that follows other text: it puts no space before it."""
        parts = {"normalizer": self._tokenizer.normalizer, "pre_tokenizer": self._tokenizer.pre_tokenizer}
        states = {name: json.loads(part.__getstate__()) for name, part in parts.items() if part}
        changed = _without_prefix(states)
        if changed == states:
            return self._tokenizer
        following = tokenizers.Tokenizer.from_str(json.dumps(json.loads(self._tokenizer.to_str()) | changed))
        following.encode_special_tokens = True
        first, whole = (self.encode_piece(text, False) for text in ("ab", "ab cd"))
        (encoding,) = following.encode_batch_fast([" cd"], add_special_tokens=False)
        return following if first + encoding.ids == whole else self._tokenizer

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in repr(self._tokenizer.decoder)

    def _bytes(self, token: int) -> int:
        piece = self._tokenizer.id_to_token(token)
        if added := self._added.get(token):
            return 0 if added.special else len(added.content.encode())
        if piece is None:  # a gap in the vocabulary
            return 0
        if self._byte_level:  # a piece has one character for each byte
            return len(piece)
        return 1 if BYTE_PIECE.fullmatch(piece) else len(piece.replace(SPACE_MARK, " ").encode())


def _without_prefix(component: Any) -> Any:
    """Return a part of a tokenizer.json without what puts a space before each text."""
    if isinstance(component, list):
        return [_without_prefix(item) for item in component if not _prepends(item)]
    if not isinstance(component, dict):
        return component
    changed = {name: None if _prepends(item) else _without_prefix(item) for name, item in component.items()}
    if changed.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if changed.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    return changed


def _prepends(component: Any) -> bool:
    return isinstance(component, dict) and component.get("type") == "Prepend"


def _token(value: str | dict[str, str]) -> str:
    """Return the text of a special token in tokenizer_config.json: a string, or the fields of an AddedToken."""
    token = value if isinstance(value, str) else value["content"]
    if not isinstance(token, str):
        raise TypeError(f"{token!r} is not a token")
    return token
