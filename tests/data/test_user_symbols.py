"""`prep tokenizer --user_symbols`: texts that are always one token."""

from pathlib import Path

import pytest

from data_prep.train_tokenizer import train_tokenizer
from infini_train.tokenizer.loading import load_tokenizer
from tests.helpers.corpora import text

SYMBOLS = ["<|user|>", "<|end_of_turn|>"]


def test_symbols_are_one_token_and_nothing_else_changes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(0, 2000))
    train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.model", vocab_size=300, user_symbols=SYMBOLS)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    ids = [tokenizer.encode(symbol)[1:-1].tolist() for symbol in SYMBOLS]
    assert ids == [[3], [4]]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 300)
    chat = f"{SYMBOLS[0]}{text(1, 30)}{SYMBOLS[1]}\n{SYMBOLS[0]} {SYMBOLS[0]}|user|>" * 50
    found = tokenizer.encode(chat)[1:-1]
    assert tokenizer.decode(found) == chat
    assert [(found == token).sum() for token in (3, 4)] == [chat.count(symbol) for symbol in SYMBOLS]
    assert tokenizer.processor.encode(chat) == found.tolist()


@pytest.mark.parametrize("symbol", ["", "a b", "a\n", "a,b", "\u2581", "x" * 65, "<s>"])
def test_bad_symbols(tmp_path: Path, symbol: str) -> None:
    with pytest.raises(ValueError, match="user_symbols: found"):
        train_tokenizer([tmp_path], tmp_path / "t.model", vocab_size=300, user_symbols=[symbol])
