"""Tokenizers that documents are encoded with: sentencepiece models, and those of Hugging Face (tokenizer.json)."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from infini_train.tokenizer.sentencepiece_text import SPACE_MARK, TextEncoder

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer(ABC):
    """What a dataset needs of a tokenizer. Text that spells a special token is text to it, never that token.

    `files`: name and content of all files that a dataset keeps of it; `file` names the one that `sha256` is of.
    """

    path: Path
    file: str
    files: dict[str, bytes]
    vocab_size: int
    bos_id: int
    eos_id: int

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.files[self.file]).hexdigest()

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.vocab_size <= 65536 else np.uint32

    def encode(self, text: str) -> np.ndarray:
        """BOS, the tokens of `text`, EOS, as `dtype`."""
        return np.fromiter(chain([self.bos_id], self._encode(text), [self.eos_id]), self.dtype)

    @cached_property
    def bytes_V(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int64 [vocab_size]; special tokens count 0."""
        return np.array([self._bytes(i) for i in range(self.vocab_size)], np.int64)

    @abstractmethod
    def decode(self, tokens: np.ndarray) -> str: ...

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _bytes(self, token: int) -> int: ...


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer at `path`: tokenizer.json, or the directory that holds it; else a sentencepiece model.

    Raises FileNotFoundError or ValueError if there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {path} does not exist: train one with `python -m data_prep tokenizer`")
    if path.is_dir() or path.name == JSON:
        return HuggingFaceTokenizer(path / JSON if path.is_dir() else path)
    return SentencePieceTokenizer(path)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with BOS and EOS. Raises ValueError if `path` is not one."""

    file = MODEL

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {MODEL: path.read_bytes()}
        try:
            if not self.files[MODEL]:
                raise RuntimeError("an empty file")
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.files[MODEL])
        except RuntimeError:
            raise ValueError(f"tokenizer {path} is not a sentencepiece model, nor named {JSON}") from None
        self.vocab_size = self.processor.vocab_size()
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"tokenizer {path} needs both BOS and EOS, its ids are {self.bos_id} and {self.eos_id}")
        self._encoder = TextEncoder(self.processor)

    def decode(self, tokens: np.ndarray) -> str:
        return self.processor.decode(tokens.tolist())

    def _encode(self, text: str) -> list[int]:
        return self._encoder.encode(text)

    def _bytes(self, token: int) -> int:
        if self.processor.is_byte(token):
            return 1
        if self.processor.is_control(token) or self.processor.is_unknown(token):
            return 0
        return len(self.processor.id_to_piece(token).replace(SPACE_MARK, " ").encode())


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, taken as it is; tokenizer_config.json beside it names BOS and EOS.

    A tokenizer with EOS alone, such as GPT-2's, has it for BOS too. Raises FileNotFoundError or ValueError for
    files that are missing or no such tokenizer.
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
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer {path} is no Hugging Face tokenizer: {error}") from None
        try:
            config = json.loads(config_path.read_bytes())
            self.eos_token = eos = _token(config["eos_token"])
            self.bos_token = bos = _token(config.get("bos_token") or eos)
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
        self.vocab_size = max(vocabulary.values()) + 1
        config = {name: value for name, value in config.items() if name != "auto_map"}  # its code is not kept
        config |= {"tokenizer_class": "TokenizersBackend", "bos_token": bos, "eos_token": eos}
        self.files = {JSON: content, CONFIG: json.dumps(config, indent=1).encode() + b"\n"}

        self._tokenizer.no_truncation()  # both may be baked into tokenizer.json
        self._tokenizer.no_padding()
        self._tokenizer.add_special_tokens([bos, eos])  # they may be there as ordinary added tokens
        if {self.bos_id, self.eos_id} & set(self._encode(f"{bos} {eos}{bos}")):
            raise ValueError(f"tokenizer {path} takes {bos!r} or {eos!r} in a text for BOS or EOS")

    def decode(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens.tolist())

    def _encode(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = True  # as text; set here, since pickling forgets it
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)  # no offsets: twice as fast
        return encoding.ids

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
        if self._byte_level:  # a character for each byte
            return len(piece)
        return 1 if BYTE_PIECE.fullmatch(piece) else len(piece.replace(SPACE_MARK, " ").encode())


def _token(value: str | dict[str, str]) -> str:
    """A special token as tokenizer_config.json has it: its text, or an AddedToken's fields."""
    token = value if isinstance(value, str) else value["content"]
    if not isinstance(token, str):
        raise TypeError(f"{token!r} is no token")
    return token
