"""A tokenizer that cannot give a text back is named before anything is read, with an example."""

import io
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from data_prep.__main__ import main
from infini_train.tokenizer.loading import load_tokenizer
from tests.helpers.corpora import text


def test_lossy_tokenizers_are_named(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text(0, 900).split("\n")),
        model_writer=model,
        vocab_size=280,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "lossy.model").write_bytes(model.getvalue())
    (tmp_path / "a.txt").write_text(text(1, 50))
    assert load_tokenizer(tokenizer_path).changed_example() is None
    words = ["shard", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer"]
    assert main([*words, str(tmp_path / "lossy.model")]) == 0
    expected = "lossy.model cannot give every text back: 'one\\ntwo\\n' becomes 'one two'"
    assert expected in capsys.readouterr().err


def test_of_hugging_face(tmp_path: Path) -> None:
    """Byte-level tokenizers are lossless; a normaliser or a pre-tokeniser that drops spaces is not."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "</s>", *alphabet])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    for normaliser, expected in (
        (None, None),
        (tokenizers.normalizers.NFC(), "'Zu\u0308rich"),
        (tokenizers.normalizers.Strip(), "one\\ntwo\\n' becomes"),
    ):
        if normaliser:
            made.normalizer = normaliser
        made.save(str(tmp_path / "tokenizer.json"))
        found = load_tokenizer(tmp_path).changed_example()
        assert found is None if expected is None else found and expected in found
