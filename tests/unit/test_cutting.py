"""The ids of a text that is read in pieces, or joined, are those that its tokenizer's library gives to all of it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

import infini_train.tokenizer.cutting as cutting
import infini_train.tokenizer.loading as loading
from data_prep.planning import SEAM, SEAMS, Group, Joiner
from data_prep.shard import shard_corpus
from data_prep.tokenising import TokenisedText
from infini_train.files import digest_of
from infini_train.tokenizer.loading import Tokenizer, load_tokenizer
from tests.helpers.corpora import read_with_tarfile

WORDS = ["the", "memory", "of", "a", "segment", "isn't", "window's,", "it's", "1234", "or", "56,789.0", "dollars;"]
WORDS += ["def", "f(x):", "return", "x_1", "+", "", "y"]
CHINESE = "漢字の文章。これは例です。"
GPT2 = None  # the expression that ByteLevel has of its own
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PHRASES = r" ?\d+|[^\d\n]+|\n+"  # tokens that span words
LLAMA2 = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True}
LLAMA2 |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "ours": LLAMA2 | {"add_dummy_prefix": False},
    "ours, unigram": LLAMA2 | {"add_dummy_prefix": False, "model_type": "unigram"},
    "Llama 2": LLAMA2,
    "T5": {"model_type": "unigram"},
    "T5, BPE": {"model_type": "bpe", "byte_fallback": True},
    "words and symbols": LLAMA2 | {"split_by_whitespace": False, "user_defined_symbols": ["the w", "\n\n"]},
}


def corpus() -> list[str]:
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 12))) for _ in range(400)]
    return [" " * 4 * draw.randrange(3) + line + "." * draw.randrange(2) for line in lines] + [CHINESE] * 20


def byte_level(expression: str | None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(expression), "isolated")] if expression else []
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expression)
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["\n\n".join(corpus()), *corpus()], trainer)
    made.add_tokens([tokenizers.AddedToken("of the", rstrip=True), tokenizers.AddedToken("x_1", lstrip=True)])
    return made


def metaspace(scheme: str) -> tokenizers.Tokenizer:
    """As transformers converts Llama 2's model ("prepend") and T5's ("always")."""
    if scheme == "prepend":
        made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        space = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    if scheme == "prepend":
        trainer: trainers.Trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
        words = [f"{space}{word}" for line in corpus() for word in line.split() for space in ("", " ")]
        made.train_from_iterator(words, trainer)
    else:
        trainer = trainers.UnigramTrainer(
            vocab_size=250, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
        made.train_from_iterator(corpus(), trainer)
        made.add_special_tokens(["<s>", "</s>"])
    return made


HUGGING_FACE: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "GPT-2": lambda: byte_level(GPT2),
    "Llama 3": lambda: byte_level(LLAMA3),
    "GPT-4o": lambda: byte_level(GPT4O),
    "phrases": lambda: byte_level(PHRASES),
    "Llama 2 as JSON": lambda: metaspace("prepend"),
    "T5 as JSON": lambda: metaspace("always"),
}


def train_sentencepiece(model: Path, options: dict[str, Any]) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(model.with_suffix("")),
        vocab_size=420,
        hard_vocab_limit=options["model_type"] == "bpe",  # unigram models may be smaller
        minloglevel=2,
        **options,
    )


@pytest.fixture(scope="module", params=[*SENTENCEPIECE, *HUGGING_FACE])
def kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Callable[[str], list[int]]]:
    """A tokenizer, and its library's function that encodes a whole text."""
    root = tmp_path_factory.mktemp("tokenizer")
    if request.param in HUGGING_FACE:
        HUGGING_FACE[request.param]().save(str(root / "tokenizer.json"))
        (root / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        content = json.loads((root / "tokenizer.json").read_text())
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        peer = tokenizers.Tokenizer.from_str(json.dumps(content))
        return load_tokenizer(root), lambda text: peer.encode(text).ids
    train_sentencepiece(root / "t.model", SENTENCEPIECE[request.param])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(root / "t.model"))
    newline = processor.piece_to_id("<0x0A>")
    if request.param != "ours, unigram":
        return load_tokenizer(root / "t.model"), processor.encode
    # Tokens that are equally good, as for a run of spaces, are chosen by the rounding of scores, so by line.
    return load_tokenizer(root / "t.model"), lambda text: [
        i for line in text.split("\n") for i in [newline, *processor.encode(line)]
    ][1:]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "PIECE", 60)
    monkeypatch.setattr(cutting, "CONTEXT", 32)
    monkeypatch.setattr(cutting, "LIMIT", 400)
    monkeypatch.setattr(loading, "ROUNDED_PIECE", 60)


PARTS = st.sampled_from(
    [*WORDS, " ", "  ", "\n", "\n\n", "    ", "\t", CHINESE, "。\n", "é", "e\u0301", "<s>", "\r\n"]
)
TEXT = st.lists(st.tuples(PARTS | st.text(max_size=3), st.sampled_from(["", " ", " ", "\n"])), max_size=80).map(
    lambda parts: "".join(part + after for part, after in parts).replace("\u2581", "_")
)


def chunks_of(text: str, draw: random.Random) -> list[str]:
    places = sorted(draw.choices(range(len(text) + 1), k=3))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(TEXT, st.randoms(use_true_random=False))
def test_pieces(kind: tuple[Tokenizer, Callable[[str], list[int]]], text: str, draw: random.Random) -> None:
    tokenizer, whole = kind
    ids = tokenizer.encode(text)[1:-1].tolist()
    assert ids == whole(text)
    for edges in (False, True):
        pieces = list(tokenizer.pieces(chunks_of(text, draw), edges=edges))
        assert "".join(pieces) == text
        encoded = [i for number, piece in enumerate(pieces) for i in tokenizer.encode_piece(piece, number > 0)]
        assert encoded == ids


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(TEXT, min_size=1, max_size=5),
    st.sampled_from([[""] * 5, ["# file: src/a.c\n", "", "  # 漢 of\n", "the\n", "#  x_1 \n"]]),
    st.randoms(use_true_random=False),
)
def test_joined_texts(
    kind: tuple[Tokenizer, Callable[[str], list[int]]],
    tmp_path: Path,
    texts: list[str],
    headings: list[str],
    draw: random.Random,
) -> None:
    tokenizer, whole = kind
    headings = headings[: len(texts)]
    parts = {0: b"", SEAM: b""}
    group = Group("id", "source")
    for text, heading in zip(texts, headings, strict=True):
        tokens = TokenisedText(chunks_of(text, draw), tokenizer, joins=True)
        content = np.concatenate(list(tokens)).tobytes()
        count = len(content) // np.dtype(tokenizer.dtype).itemsize
        group.members.append(((0, len(parts[0]), count), tokens.ends, heading))
        parts[0] += content
        assert tokens.digest == digest_of(text.encode()).hex()
    joiner = Joiner(tokenizer, tmp_path)
    document = joiner.join(group)
    joiner.close()
    parts[SEAM] = (tmp_path / SEAMS).read_bytes()
    found = [np.frombuffer(parts[part], tokenizer.dtype, count, offset) for part, offset, count in document.slices]
    joined = "\n\n".join(heading + text for heading, text in zip(headings, texts, strict=True))
    assert np.concatenate(found).tolist() == [tokenizer.bos_id, *whole(joined), tokenizer.eos_id]
    assert document.tokens == sum(map(len, found))


def test_shards_of_joined_files(tmp_path: Path) -> None:
    """All stages, with a tokenizer that puts a space before a text."""
    model = tmp_path / "t.model"
    options = SENTENCEPIECE["Llama 2"]
    train_sentencepiece(model, options)
    texts = ["the memory", " of a window", "def f(x):\n    return x_1\n", "it's"]
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    shard_corpus([tmp_path / "in"], tmp_path / "out", model, join="directory", tasks=2)
    ((_, tokens),) = read_with_tarfile(tmp_path / "out")
    peer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert tokens == [1, *peer.encode("\n\n".join(texts)), 2]
