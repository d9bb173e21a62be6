"""The tokenizer of exports whose sentencepiece model cannot be represented exactly by a tokenizer.json.

Such exports include this file; `AutoTokenizer.from_pretrained(export, trust_remote_code=True)` loads it.
"""

import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

from .sentencepiece_text import TextEncoder


class SentencePieceTextTokenizer(PreTrainedTokenizer):
    """Encodes text as the training documents were encoded; with `add_bos_token`, BOS is put before it."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 (transformers' own convention)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, add_bos_token: bool = True, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self._processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self._encoder = TextEncoder(self._processor)
        pattern = "bos" if add_bos_token else "none"
        super().__init__(add_bos_token=add_bos_token, special_tokens_pattern=pattern, **kwargs)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._processor.id_to_piece(i) for i in self._encoder.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = set(self.all_special_tokens) - {self.unk_token}  # sentencepiece does not decode them
        runs = groupby(tokens, special.__contains__)
        return "".join("".join(run) if is_special else self._processor.decode(list(run)) for is_special, run in runs)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if not target.exists() or not target.samefile(self.vocab_file):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
