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
    """Encodes text as the training documents were encoded, and special tokens in a text as those tokens.

    With `add_bos_token` BOS is put before a text, and with `add_eos_token` EOS after it.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 (transformers' own convention)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, vocab_file: str, add_bos_token: bool = True, add_eos_token: bool = False, **kwargs: Any
    ) -> None:
        self.vocab_file = vocab_file
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        self._processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self._encoder = TextEncoder(self._processor)
        names = [name for name, added in (("bos", add_bos_token), ("eos", add_eos_token)) if added]
        super().__init__(special_tokens_pattern="_".join(names) or "none", **kwargs)

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
        # Special tokens and those of `add_tokens` are their own text; sentencepiece decodes only the unknown token.
        added = self.added_tokens_encoder.keys() - {self.unk_token}
        runs = groupby(tokens, added.__contains__)
        return "".join("".join(run) if is_added else self._processor.decode(list(run)) for is_added, run in runs)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if not target.exists() or not target.samefile(self.vocab_file):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
