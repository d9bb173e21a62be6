"""Files of tiktoken and tekken.json: after conversion, ids are those of tiktoken and of mistral-common."""

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_prep.convert_tokenizer as convert
from data_prep.__main__ import main
from data_prep.convert_tokenizer import ENCODINGS, convert_tokenizer
from data_prep.shard import shard_corpus
from infini_train.tokenizer.loading import load_tokenizer
from tests.helpers.corpora import read_with_tarfile

tiktoken = pytest.importorskip("tiktoken")
pytest.importorskip("mistral_common")
public = pytest.importorskip("tiktoken_ext.openai_public")

TOKENS = 3000  # of the vocabulary of tekken.json, so that the tests are fast
SPECIAL = 20
TEXT = "It's the window's 12345th  line,\n\n\tisn't it?\r\n x = f(y)  # Zürich 漢字 👩‍👩‍👧 </s><|endoftext|>"
PARTS = [
    "the",
    " the",
    "'s",
    "'S",
    "'ll",
    "1",
    "123",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "/",
    "é",
    "漢字",
    "मा",
    "</s>",
    ".",
]


@pytest.fixture(scope="module")
def tekken() -> dict[str, Any]:
    """mistral-common's own tekken.json, with fewer tokens."""
    about = json.loads((resources.files("mistral_common") / "data" / "tekken_240911.json").read_bytes())
    about["vocab"] = about["vocab"][:TOKENS]
    about["config"] |= {"default_num_special_tokens": SPECIAL, "default_vocab_size": TOKENS + SPECIAL}
    return about


def ranks_of(tekken: dict[str, Any]) -> dict[bytes, int]:
    return {base64.b64decode(token["token_bytes"]): token["rank"] for token in tekken["vocab"]}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


def texts() -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=30).map("".join)


def test_tekken_gives_the_ids_of_mistral_common(tekken: dict[str, Any], tmp_path: Path) -> None:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(tekken))
    convert_tokenizer(path, tmp_path / "made")
    peer, made = Tekkenizer.from_file(path), load_tokenizer(tmp_path / "made")
    assert (made.bos_id, made.eos_id, made.vocab_size) == (peer.bos_id, peer.eos_id, peer.n_words)

    @settings(max_examples=150, deadline=None)
    @given(texts())
    def same(text: str) -> None:
        assert made.encode(text).tolist() == peer.encode(text, bos=True, eos=True)

    same()
    (tmp_path / "a.txt").write_text(TEXT)
    shard_corpus([tmp_path / "a.txt"], tmp_path / "out", tmp_path / "made", line_ends="keep")
    ((_, tokens),) = read_with_tarfile(tmp_path / "out")
    assert tokens == peer.encode(TEXT, bos=True, eos=True)


@pytest.mark.parametrize("name", ENCODINGS)
def test_tiktoken_gives_the_ids_of_openais_encodings(
    name: str, tekken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pattern and EOS are those that tiktoken has for the name; only the tokens are others."""
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(public, loader, lambda *_, **__: ranks_of(tekken))
    encoding = public.ENCODING_CONSTRUCTORS[name]() | {"explicit_n_vocab": None}
    eos = encoding["special_tokens"]["<|endoftext|>"]
    peer = tiktoken.Encoding(**encoding)
    convert_tokenizer(write_ranks(tmp_path / f"{name}.tiktoken", ranks_of(tekken)), tmp_path / "made")
    made = load_tokenizer(tmp_path / "made")

    @settings(max_examples=150, deadline=None)
    @given(texts())
    def same(text: str) -> None:
        assert made.encode(text).tolist() == [eos, *peer.encode(text, disallowed_special=()), eos]

    same()


def test_other_files_of_tiktoken(tekken: dict[str, Any], tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "tokenizer.model", ranks_of(tekken))
    with pytest.raises(ValueError, match=r"does not tell how a text is split into words, nor its EOS"):
        convert_tokenizer(path, tmp_path / "made")
    words = ["convert-tokenizer", str(path), "--out", str(tmp_path / "made"), "--pattern", "cl100k"]
    assert main([*words, "--bos", "<|begin_of_text|>", "--eos", "<|end_of_text|>"]) == 0
    made = load_tokenizer(tmp_path / "made")
    assert (made.bos_id, made.eos_id, made.vocab_size) == (TOKENS, TOKENS + 1, TOKENS + 2)
    assert made.decode(made.encode(TEXT)[1:-1]) == TEXT


def test_wrong_files(tekken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ranks = tmp_path / "tekken.json", ranks_of(tekken)
    path.write_text(json.dumps(tekken))
    with pytest.raises(ValueError, match=r"expected none: a tekken.json tells them itself"):
        convert_tokenizer(path, tmp_path / "made", eos="</s>")
    for wrong in (path, write_ranks(tmp_path / "p50k_base.tiktoken", ranks)):
        with pytest.raises(ValueError, match=r"of tiktoken or tekken: `infini-train prep convert-tokenizer`"):
            load_tokenizer(wrong)
    path.write_text('{"config": {}}')
    with pytest.raises(ValueError, match=r"found no tekken.json: KeyError: 'pattern'"):
        convert_tokenizer(path, tmp_path / "made")
    broken = tmp_path / "cl100k_base.tiktoken"
    broken.write_text("IQ== 0\nnot base64 1\n")
    with pytest.raises(ValueError, match=r"line 2: found b'not base64 1', expected a token in base64 and its rank"):
        convert_tokenizer(broken, tmp_path / "made")
    write_ranks(broken, dict(list(ranks.items())[1:]))
    with pytest.raises(ValueError, match=r"expected all 256 bytes and ranks without a gap"):
        convert_tokenizer(broken, tmp_path / "made")
    # A converter that errs is noticed before anything is written.
    write_ranks(broken, ranks)
    monkeypatch.setitem(convert.PATTERNS, "cl100k", r"\w+|\W+")
    monkeypatch.setattr(tiktoken, "Encoding", lambda *_, pat_str, **more: Original("x", pat_str=r"\w+|\W", **more))
    with pytest.raises(ValueError, match=r"cannot be converted: it encodes"):
        convert_tokenizer(broken, tmp_path / "made")
    assert not (tmp_path / "made").exists()


Original = tiktoken.Encoding
