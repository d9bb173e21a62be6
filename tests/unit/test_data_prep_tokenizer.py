import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.tokenizer import Tokenizer, train_tokenizer

WORDS = [a + b + c for a in ("mem", "win", "seg", "ra") for b in ("o", "do", "men") for c in ("ry", "w", "t", "nk")]


def corpus_text(seed: int, lines: int = 300) -> str:
    draw = random.Random(seed)
    return "\n".join(
        "    " * draw.randrange(3) + " ".join(draw.choices(WORDS, k=draw.randrange(12))) for _ in range(lines)
    )


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    root = tmp_path_factory.mktemp("tokenizer")
    (root / "a.txt").write_text(corpus_text(0))
    train_tokenizer([root / "a.txt"], root / "made" / "t.model", vocab_size=330, model_type=request.param)
    return Tokenizer(root / "made" / "t.model")


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (330, 1, 2)
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert (peer.unk_id(), peer.pad_id()) == (0, -1)
    assert [peer.id_to_piece(i) for i in (3, 258)] == ["<0x00>", "<0xFF>"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["memory", " ", "  ", "\n", "\t", "\r\n", "\u2581", "<s>", "</s>", "<0x0A>", "\0", "é"])
        | st.text(max_size=5)
    ).map("".join)
)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert (tokens[0], tokens[-1]) == (1, 2)
    assert not np.isin(tokens[1:-1], [0, 1, 2]).any()
    assert tokenizer.decode(tokens[1:-1]) == text
    assert tokenizer.bytes_V[tokens].sum() == len(text.encode())


def test_line_by_line_is_sentencepiece_on_the_whole_text(tokenizer: Tokenizer) -> None:
    text = corpus_text(5) + "\n\n\tindented\r\nzürich 漢字\n"
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert tokenizer.encode(text).tolist() == [1, *peer.encode(text), 2]


@pytest.mark.parametrize(
    "options",
    [
        {"vocab_size": 36},  # folds white space, joins lines, no byte pieces
        {  # as Llama 2: a space before each text, but not before each line
            "vocab_size": 295,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        },
        {  # tokens that go over the end of a line
            "vocab_size": 295,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            "user_defined_symbols": ["\n\n", "w\nm"],
        },
    ],
)
def test_a_foreign_model_is_used_as_it_is(tmp_path: Path, options: dict[str, Any]) -> None:
    """Documents get the tokens that sentencepiece gives for the whole text, even where line by line differs."""
    text = corpus_text(1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_prefix=str(tmp_path / "foreign"),
        minloglevel=2,
        **options,
    )
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "foreign.model"))
    text += "\n\nmemow\nmem\n\n\n  end"
    assert Tokenizer(tmp_path / "foreign.model").encode(text).tolist() == [1, *peer.encode(text), 2]


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (20_000, r"vocab_size 20000 is too large for so little text: at most \d+"),
        (261, "261 is too small: bytes and frequent characters alone need 2"),
        (259, "must be over 259"),
    ],
)
def test_vocabulary_that_does_not_fit(tmp_path: Path, vocab_size: int, message: str) -> None:
    (tmp_path / "a.txt").write_text(corpus_text(0))
    with pytest.raises(ValueError, match=message):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.model", vocab_size=vocab_size)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_sample_is_bounded_even_and_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("\n".join(f"{i} {n:06d} memory" for n in range(5000)))
    samples = []
    monkeypatch.setattr("data_prep.tokenizer.ordered_map", lambda _, jobs, workers: [samples.append(jobs[0])])
    for _ in range(2):
        with pytest.raises(TypeError):  # no model came out of it
            train_tokenizer([tmp_path], tmp_path.parent / "t.model", vocab_size=300, sample_bytes=40_000)
    lines, vocab_size, _ = samples[0]
    assert samples[0] == samples[1]
    assert vocab_size == 300
    assert 30_000 < sum(map(len, lines)) <= 40_000
    per_file = [sum(line.startswith(f"{i} ") for line in lines) for i in range(4)]
    assert min(per_file) > 0.8 * len(lines) / 4


def test_long_lines_are_cut_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(corpus_text(0).replace("\n", " "))
    train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.model", vocab_size=330)
    assert len(Tokenizer(tmp_path / "t.model").encode("memory window rank")) < 10


def test_finished_model_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(corpus_text(0))
    output = tmp_path / "t.model"
    train_tokenizer([tmp_path / "a.txt"], output, vocab_size=300)
    before = output.stat()
    train_tokenizer([tmp_path / "a.txt"], output, vocab_size=300)
    assert "nothing to do" in capsys.readouterr().out
    assert output.stat().st_ino == before.st_ino
    with pytest.raises(ValueError, match="made with other options: give --overwrite"):
        train_tokenizer([tmp_path / "a.txt"], output, vocab_size=310)
    train_tokenizer([tmp_path / "a.txt"], output, vocab_size=310, overwrite=True)
    assert Tokenizer(output).vocab_size == 310


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(corpus_text(0))
    for name in ("1.model", "2.model"):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / name, vocab_size=320, model_type="unigram")
    assert (tmp_path / "1.model").read_bytes() == (tmp_path / "2.model").read_bytes()


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"t\.model does not exist"):
        Tokenizer(tmp_path / "t.model")
    for content in (b"", b"not a model at all"):
        (tmp_path / "t.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.model is not a sentencepiece model"):
            Tokenizer(tmp_path / "t.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus_text(1).split("\n")),
        model_prefix=str(tmp_path / "no_bos"),
        vocab_size=36,
        bos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="needs both BOS and EOS, its ids are -1 and 2"):
        Tokenizer(tmp_path / "no_bos.model")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_dtype(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, vocab_size: int, dtype: type) -> None:
    monkeypatch.setattr(tokenizer, "vocab_size", vocab_size)
    assert tokenizer.dtype is dtype
    assert tokenizer.encode("memory").dtype == dtype
