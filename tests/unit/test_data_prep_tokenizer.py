import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.shard import shard_corpus
from data_prep.stats import dataset_stats
from data_prep.train_tokenizer import train_tokenizer
from data_prep.validate import validate_dataset
from infini_train.data.index import DatasetIndex
from infini_train.tokenizer.loading import SentencePieceTokenizer, load_tokenizer

WORDS = [a + b + c for a in ("mem", "win", "seg", "ra") for b in ("o", "do", "men") for c in ("ry", "w", "t", "nk")]


def corpus_text(seed: int, lines: int = 300) -> str:
    draw = random.Random(seed)
    return "\n".join(
        "    " * draw.randrange(3) + " ".join(draw.choices(WORDS, k=draw.randrange(12))) for _ in range(lines)
    )


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    root = tmp_path_factory.mktemp("tokenizer")
    (root / "a.txt").write_text(corpus_text(0))
    train_tokenizer([root / "a.txt"], root / "made" / "t.model", vocab_size=330, model_type=request.param)
    return load_tokenizer(root / "made" / "t.model")


def test_special_ids(tokenizer: SentencePieceTokenizer) -> None:
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
def test_decoding_gives_the_text_back(tokenizer: SentencePieceTokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert (tokens[0], tokens[-1]) == (1, 2)
    assert not np.isin(tokens[1:-1], [0, 1, 2]).any()
    assert tokenizer.decode(tokens[1:-1]) == text
    assert tokenizer.bytes_V[tokens].sum() == len(text.encode())


def test_line_by_line_is_sentencepiece_on_the_whole_text(tokenizer: SentencePieceTokenizer) -> None:
    text = corpus_text(5) + "\n\n\tindented\r\nzürich 漢字\n"
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert tokenizer.encode(text).tolist() == [1, *peer.encode(text), 2]


@pytest.mark.parametrize(
    "options",
    [
        {"vocab_size": 36},  # collapses white space, joins lines, has no byte pieces
        {  # like Llama 2: a space before each text, but not before each line
            "vocab_size": 295,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        },
        {  # tokens that cross ends of lines
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
    """Documents get sentencepiece's tokens of the whole text, even if encoding by lines would give others."""
    text = corpus_text(1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_prefix=str(tmp_path / "foreign"),
        minloglevel=2,
        **options,
    )
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "foreign.model"))
    text += "\n\nmemow\nmem\n\n\n  end"
    assert load_tokenizer(tmp_path / "foreign.model").encode(text).tolist() == [1, *peer.encode(text), 2]


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (20_000, r"vocab_size 20000 is too large for so little text: at most \d+"),
        (261, "261 is too small: bytes and frequent characters alone need 2"),
        (259, "vocab_size: found 259, expected more than 259"),
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
    monkeypatch.setattr("data_prep.train_tokenizer.ordered_map", lambda _, jobs, workers: [samples.append(jobs[0])])
    for _ in range(2):
        with pytest.raises(TypeError):  # no model was made
            train_tokenizer([tmp_path], tmp_path.parent / "t.model", vocab_size=300, sample_bytes=40_000)
    lines, vocab_size, _, _ = samples[0]
    assert samples[0] == samples[1]
    assert vocab_size == 300
    assert 30_000 < sum(map(len, lines)) <= 40_000
    per_file = [sum(line.startswith(f"{i} ") for line in lines) for i in range(4)]
    assert min(per_file) > 0.8 * len(lines) / 4


def test_long_lines_are_cut_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(corpus_text(0).replace("\n", " "))
    train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.model", vocab_size=330)
    assert len(load_tokenizer(tmp_path / "t.model").encode("memory window rank")) < 10


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
    assert load_tokenizer(output).vocab_size == 310


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(corpus_text(0))
    for name in ("1.model", "2.model"):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / name, vocab_size=320, model_type="unigram")
    assert (tmp_path / "1.model").read_bytes() == (tmp_path / "2.model").read_bytes()


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"t\.model does not exist"):
        load_tokenizer(tmp_path / "t.model")
    for content in (b"", b"not a model at all"):
        (tmp_path / "t.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.model is not a sentencepiece model"):
            load_tokenizer(tmp_path / "t.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus_text(1).split("\n")),
        model_prefix=str(tmp_path / "no_bos"),
        vocab_size=36,
        bos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="needs both BOS and EOS, its ids are -1 and 2"):
        load_tokenizer(tmp_path / "no_bos.model")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_dtype(
    tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, vocab_size: int, dtype: type
) -> None:
    monkeypatch.setattr(tokenizer, "vocab_size", vocab_size)
    assert tokenizer.dtype is dtype
    assert tokenizer.encode("memory").dtype == dtype


SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    """A byte-level BPE whose tokenizer.json has truncation, padding and a template, which must have no effect."""
    root = tmp_path / "hf"
    root.mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=370, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus_text(0).split("\n"), trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "<|bos|> $A <|eos|>", None, [("<|bos|>", 0), ("<|eos|>", 1)]
    )
    made.add_tokens(["winmem"])  # not special: a token wherever it occurs
    made.enable_truncation(8)
    made.enable_padding(pad_id=2, pad_token="<|pad|>", length=8)
    made.save(str(root / "tokenizer.json"))
    write_config(
        root,
        bos_token="<|bos|>",
        eos_token={"content": "<|eos|>", "lstrip": False},
        auto_map={"AutoTokenizer": "x.Y"},
    )
    return root


def write_config(root: Path, **config: Any) -> None:
    (root / "tokenizer_config.json").write_text(json.dumps(config))


def change(root: Path, **changes: Any) -> dict[str, Any]:
    content = json.loads((root / "tokenizer.json").read_text()) | changes
    (root / "tokenizer.json").write_text(json.dumps(content))
    return content


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["memory", "winmem", "  ", "\n", "\u2581", *SPECIAL, "<0x0A>", "\0", "é", "Ġ"])
        | st.text(max_size=5)
    ).map("".join)
)
def test_hugging_face_reads_special_tokens_as_text(hugging_face: Path, text: str) -> None:
    """The peer has no special tokens, so it cannot encode any text as one."""
    content = json.loads((hugging_face / "tokenizer.json").read_text())
    added = [token for token in content["added_tokens"] if not token["special"]]
    plain = content | {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    peer = tokenizers.Tokenizer.from_str(json.dumps(plain))
    tokenizer = load_tokenizer(hugging_face)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (371, 0, 1)
    tokens = tokenizer.encode(text)
    assert tokens.tolist() == [0, *peer.encode(text).ids, 1]
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text).tolist() == tokens.tolist()
    assert tokenizer.decode(tokens[1:-1]) == text
    assert tokenizer.bytes_V[tokens].sum() == len(text.encode())


def test_hugging_face_bytes_of_sentencepiece_like_pieces(tmp_path: Path) -> None:
    vocabulary = {"</s>": 0, "<0x0A>": 1, "\u2581": 2, "é": 3, "\u2581é": 4}
    model = tokenizers.models.BPE(vocabulary, [("\u2581", "é")], byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    made.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, eos_token="</s>")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 0)  # only EOS, like GPT-2
    assert tokenizer.encode(" é\n").tolist() == [0, 4, 1, 0]
    assert tokenizer.bytes_V.tolist() == [0, 1, 1, 2, 3]


def test_hugging_face_marks_are_special_even_if_the_file_does_not_say_so(hugging_face: Path) -> None:
    added = json.loads((hugging_face / "tokenizer.json").read_text())["added_tokens"]
    change(hugging_face, added_tokens=[token | {"special": False} for token in added])
    assert not np.isin(load_tokenizer(hugging_face).encode("a<|bos|><|eos|>")[1:-1], [0, 1]).any()
    write_config(hugging_face, bos_token="Ġ", eos_token="<|eos|>")
    with pytest.raises(ValueError, match=r"tokenizer\.json encodes 'Ġ' or '<\|eos\|>' in a text as BOS or EOS"):
        load_tokenizer(hugging_face)


def test_shards_of_a_hugging_face_tokenizer(
    hugging_face: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus").mkdir()
    texts = [corpus_text(i) + "<|eos|>" for i in range(4)]
    for i, text in enumerate(texts):
        (tmp_path / "corpus" / f"{i}.txt").write_text(text)
    out = tmp_path / "out"
    shard_corpus([tmp_path / "corpus"], out, hugging_face, workers=2)
    index = DatasetIndex.load(out)
    assert (index.tokenizer_file, index.vocab_size, index.bos_id, index.eos_id) == ("tokenizer.json", 371, 0, 1)
    assert validate_dataset(out) == []
    assert dataset_stats(out)["bytes"] == sum(map(len, texts))
    copy = load_tokenizer(out)
    assert (copy.sha256, copy.bos_id, copy.eos_id) == (index.tokenizer_sha256, 0, 1)
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())

    shard_corpus([tmp_path / "corpus"], out, hugging_face)
    assert "nothing to do" in capsys.readouterr().out
    write_config(hugging_face, bos_token="<|pad|>", eos_token="<|eos|>")
    with pytest.raises(ValueError, match=r"other options \(bos_id\): give --overwrite"):
        shard_corpus([tmp_path / "corpus"], out, hugging_face)
    write_config(out, bos_token="<|pad|>", eos_token="<|eos|>")
    assert validate_dataset(out) == [
        "tokenizer.json: vocab_size, bos_id, eos_id are (371, 2, 1), the index says (371, 0, 1)"
    ]


def test_what_is_no_hugging_face_tokenizer(hugging_face: Path) -> None:
    for config in (
        {},
        {"bos_token": "<|bos|>"},
        {"eos_token": None},
        {"eos_token": {"content": 5}},
        {"eos_token": 5},
    ):
        write_config(hugging_face, **config)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json names no eos_token"):
            load_tokenizer(hugging_face)
    for text in ("[]", "5", "{"):
        (hugging_face / "tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json names no eos_token"):
            load_tokenizer(hugging_face)
    write_config(hugging_face, bos_token="<|bos|>", eos_token="<end>")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: eos_token is '<end>', which is not in the vocab"):
        load_tokenizer(hugging_face)
    (hugging_face / "tokenizer.json").write_bytes(b"{}\xff")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a Hugging Face tokenizer"):
        load_tokenizer(hugging_face)
    (hugging_face / "tokenizer_config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer_config\.json does not exist, expected tokenizer\.json and"
    ):
        load_tokenizer(hugging_face)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(hugging_face.parent)
