"""Synthetic documents are checked word by word, with a dictionary that is independent of how they were drawn."""

import hashlib
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from data_prep.__main__ import main
from data_prep.train_tokenizer import train_tokenizer
from infini_train.data.index import DatasetIndex
from infini_train.data.reader import TokenReader
from infini_train.synthetic import (
    DATASET,
    EVALUATION,
    PasskeyTask,
    RecallTask,
    TaskMixture,
    Vocabulary,
    documents,
    synthetic_task,
)
from infini_train.tokenizer.export import export_tokenizer
from tests.helpers.synthetic_replay import VOCABULARY, replay, tellings, words

TASKS = {
    "recall": RecallTask(300),
    "few keys": RecallTask(300, fewest=2),
    "changes": RecallTask(301, change=0.3),
    "noise": RecallTask(300, noise=0.4),
    "everything": RecallTask(320, shortest=32, fewest=3, change=0.2, noise=0.3),
    "passkey": PasskeyTask(300, digits=3),
    "thick": PasskeyTask(300, thick=1.0),
    "passkeys change": PasskeyTask(300, digits=2, thick=0.5, change=0.4),
    "deep": PasskeyTask(97, depth=0.3),
    "mixture": TaskMixture(RecallTask(200, change=0.1), PasskeyTask(200, shortest=40), 0.5),
}


def drawn(task, count: int = 20, vocabulary: Vocabulary = VOCABULARY, seed: int = 3):
    return list(documents(task, vocabulary, count, seed=seed, stream=DATASET))


@pytest.mark.parametrize("name", TASKS)
def test_documents_equal_a_replay(name):
    totals = np.zeros(3, int)
    for document in drawn(TASKS[name]):
        text = words(document)
        assert (text[0], text[-1]) == ("<s>", "</s>")
        assert not {"<s>", "</s>", "<unk>"} & set(text[1:-1])
        assert document.tokens_T.dtype == np.uint32
        for size, window in ((8, None), (13, None), (8, 5), (13, 13), (13, 20), (16, 32), (32, None)):
            expected = replay(text, size, window)
            assert np.flatnonzero(document.previous_T >= 0).tolist() == sorted(expected)
            assert np.flatnonzero(document.memory_only(size, window)).tolist() == [
                p for p, (only, _) in expected.items() if only
            ]
            assert np.flatnonzero(document.changed_T).tolist() == [
                p for p, (_, several) in expected.items() if several
            ]
        for place in np.flatnonzero(document.previous_T >= 0):
            assert text[document.previous_T[place]] == text[place]
        totals += len(expected), sum(only for only, _ in expected.values()), sum(s for _, s in expected.values())
    assert totals[0] > totals[1] > 0 or name == "deep"
    assert bool(totals[2]) == (name in ("changes", "everything", "mixture", "passkeys change"))


def test_a_value_that_returns_is_still_the_latest_of_several():
    """With two values, each change but the first returns to an earlier value; `replay` counts distinct values."""
    for document in drawn(RecallTask(200, change=0.5), vocabulary=Vocabulary(2, 2, 1)):
        expected = replay(words(document, Vocabulary(2, 2, 1)), 8)
        assert np.flatnonzero(document.changed_T).tolist() == [p for p, (_, several) in expected.items() if several]


def test_shares_are_those_asked_for():
    recall = [words(d) for d in drawn(RecallTask(2000, change=0.1, noise=0.25), 40)]
    noise = np.mean([word[0] == "n" for text in recall for word in text])
    assert noise == pytest.approx(0.25, abs=0.01)
    news = told = 0
    for text in recall:
        latest: dict[str, str] = {}
        for key, (place,) in tellings(text):
            told += key in latest
            news += latest.setdefault(key, text[place]) != text[place]
            latest[key] = text[place]
    assert news / told == pytest.approx(0.1, abs=0.01)
    # Without noise, pairs follow one another; if the room is odd, one word is left over.
    assert [w[0] for w in words(drawn(RecallTask(31), 1)[0])[1:-1]] == ["k", "v"] * 14 + ["n"]

    keys = [{key for key, _ in tellings(words(d))} for d in drawn(RecallTask(600, fewest=2), 400)]
    few = [those for those in keys if len(those) < 12]
    assert len(few) / len(keys) == pytest.approx(0.5, abs=0.08)
    assert min(map(len, few)) == 2
    assert len(set().union(*(those for those in few if len(those) < 5))) == 12, "few keys are any keys"
    values = [text[place] for text in recall for _, (place,) in tellings(text)]
    assert len(set(values)) == VOCABULARY.values

    lengths = [len(d.tokens_T) for d in drawn(RecallTask(100, shortest=30), 300)]
    assert sorted(set(lengths)) == [30, 60, 90]
    assert min(lengths.count(n) for n in (30, 60, 90)) > 70
    kinds = [
        "passkey" in words(d) for d in drawn(TaskMixture(RecallTask(200), PasskeyTask(200, thick=1.0), 0.3), 400)
    ]
    assert np.mean(kinds) == pytest.approx(0.3, abs=0.07)


def test_passkeys_stand_where_they_should():
    for depth, place in ((0.0, 1), (0.5, 44), (1.0, 87)):
        told, asked = (places for _, places in tellings(words(drawn(PasskeyTask(100, depth=depth), 1)[0])))
        assert (told[0] - 1, asked[-1]) == (place, 98)
        assert len(told) == len(asked) == 5
    for longest, length in ((64, 800), (256, 3200)):
        limits = np.exp(np.linspace(math.log(4), math.log(longest), 200))  # of the gaps, rounded down, by document
        mean_gaps = [np.floor(np.exp(np.linspace(0, math.log(most), 1000))).mean() for most in limits]
        drawn_with = PasskeyTask(length, thick=1.0, longest_gap=longest)
        thick = [(d.tokens_T == VOCABULARY.first).sum() for d in drawn(drawn_with, 1000)]
        assert np.mean(thick) == pytest.approx(np.mean([length / (gap + 6) for gap in mean_gaps]), rel=0.05)
    thin = [len(tellings(words(d))) for d in drawn(PasskeyTask(800), 50)]
    assert np.mean(thin) < 20
    share = [len(tellings(words(d))) > 20 for d in drawn(PasskeyTask(800, thick=0.3), 300)]
    assert np.mean(share) == pytest.approx(0.3, abs=0.08)
    keys = {tuple(words(d)[p] for p in tellings(words(d))[0][1]) for d in drawn(PasskeyTask(100, depth=0.5), 50)}
    assert len(keys) > 45


def test_a_document_depends_on_seed_stream_and_number_alone():
    task = TASKS["everything"]

    def all_of(count: int, **draw: int) -> list[bytes]:
        return [
            d.tokens_T.tobytes() for d in documents(task, VOCABULARY, count, **{"seed": 0, "stream": DATASET, **draw})
        ]

    assert all_of(5) == all_of(9)[:5]
    assert len({*all_of(9), *all_of(9, seed=1), *all_of(9, stream=EVALUATION)}) == 27


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vocabulary(keys=0, values=1), "keys: found 0, expected at least 1; values: found 1"),
        (
            lambda: Vocabulary(5, 5, 5).within(284, 1, 2, least=259),
            "vocabulary: found 284 tokens, expected at least 285",
        ),
        (lambda: RecallTask(3), "tokens: found 3, expected at least 4"),
        (lambda: RecallTask(50, shortest=51), "shortest: found 51, expected at most 50"),
        (lambda: RecallTask(50, change=1.0), "change: found 1.0"),
        (lambda: RecallTask(50, noise=-0.1), "noise: found -0.1"),
        (lambda: drawn(RecallTask(50, fewest=13)), "fewest: found 13, expected at most 12"),
        (lambda: PasskeyTask(13), "tokens: found 13, expected at least 14"),
        (lambda: PasskeyTask(50, longest_gap=3), "longest_gap: found 3, expected at least 4"),
        (lambda: PasskeyTask(50, depth=1.1), "depth: found 1.1, expected 0 to 1"),
        (lambda: TaskMixture(RecallTask(50), PasskeyTask(50), 2), "passkey_share: found 2"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


OPTIONS = "--documents 60 --tokens 96 --shortest 24 --keys 12 --values 7 --noise-tokens 5 --fewest 3 --change 0.2 "
OPTIONS += "--noise 0.3 --passkey 0.3 --thick 0.4 --passkey-change 0.2 --seed 3 --validation-fraction 0.2 "
OPTIONS += "--shard-tokens 1000"


def synth(out: Path, *extra: str) -> int:
    return main(["synth", "--out", str(out), *OPTIONS.split(), *extra])


def content(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def test_dataset_holds_the_documents_and_its_bytes_depend_on_the_options_alone(tmp_path, capsys):
    assert synth(tmp_path / "a") == synth(tmp_path / "b") == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert synth(tmp_path / "a") == 0
    assert "nothing to do" in capsys.readouterr().out
    before = content(tmp_path / "a")
    assert synth(tmp_path / "a", "--seed", "4") == 2
    assert "made with other options (synthetic)" in capsys.readouterr().err
    assert content(tmp_path / "a") == before
    assert synth(tmp_path / "a", "--seed", "4", "--overwrite") == 0
    assert content(tmp_path / "a") != before

    task = TaskMixture(RecallTask(96, 24, 3, 0.2, 0.3), PasskeyTask(96, 24, thick=0.4, change=0.2), 0.3)
    expected = {f"3-{i}": d.tokens_T.astype("<u2").tobytes() for i, d in enumerate(drawn(task, 60))}
    found: dict[str, dict[str, bytes]] = {}
    for part in ("train", "valid"):
        assert main(["validate", str(tmp_path / "b" / part)]) == 0
        assert synthetic_task(DatasetIndex.load(tmp_path / "b" / part).options) == (task, VOCABULARY)
        found[part] = {}
        for shard in sorted((tmp_path / "b" / part).glob("*.tar")):
            with tarfile.open(shard) as tar:
                files = {m.name: tar.extractfile(m).read() for m in tar}
            for name in {name.split(".")[0] for name in files}:
                found[part][json.loads(files[f"{name}.json"])["id"]] = files[f"{name}.tokens.bin"]
    assert found["train"] | found["valid"] == expected
    assert not found["train"].keys() & found["valid"].keys()
    assert min(map(len, found.values())) > 3


def test_tokenizer_spells_the_tokens(tmp_path):
    """`tokenizers` and an export's AutoTokenizer encode the text of a document to the document's ids."""
    assert synth(tmp_path / "a") == 0
    index = DatasetIndex.load(tmp_path / "a" / "train")
    assert (index.vocab_size, index.bos_id, index.eos_id) == (14 + 12 + 7 + 5, 1, 2)
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "train" / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    export_tokenizer(index.root / "tokenizer.json", tmp_path / "out", bos_id=1, eos_id=2, max_length=100)
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    for document in drawn(TASKS["mixture"], 10):
        text = words(document)
        assert own.encode(" ".join(text[1:-1]), add_special_tokens=False).ids == document.tokens_T[1:-1].tolist()
        assert exported(" ".join(text[1:-1]))["input_ids"] == document.tokens_T[:-1].tolist()
        assert exported.decode(document.tokens_T[1:-1].tolist()) == " ".join(text[1:-1])


def test_with_a_text_tokenizer_the_same_documents_stand_in_its_last_tokens(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps\n" * 50)
    train_tokenizer([tmp_path / "text.txt"], tmp_path / "t.model", vocab_size=300)
    out = tmp_path / "a"
    assert synth(out, "--tokenizer", str(tmp_path / "t.model")) == 0
    assert synth(tmp_path / "own") == 0
    shift = 300 - (14 + 12 + 7 + 5)
    for part in ("train", "valid"):
        assert main(["validate", str(out / part)]) == 0
        index, own = DatasetIndex.load(out / part), DatasetIndex.load(tmp_path / "own" / part)
        assert (index.vocab_size, index.tokenizer_file) == (300, "tokenizer.model")
        task, vocabulary = synthetic_task(index.options)
        assert vocabulary.first == 3 + shift
        assert synthetic_task(own.options) == (task, VOCABULARY)
        found, expected = (
            TokenReader(i).read(d, 0, int(i.tokens_D[d])).astype(int) for i in (index, own) for d in [1]
        )
        assert found.tolist() == [t if t < 3 else t + shift for t in expected.tolist()]
    assert synth(tmp_path / "b", "--tokenizer", str(tmp_path / "t.model"), "--keys", "200") == 2
    assert "vocabulary: found 300 tokens, expected at least 482" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--documents", "0"], "documents: found 0, expected at least 1"),
        (["--fewest", "13"], "fewest: found 13, expected at most 12"),
        (["--validation-fraction", "1"], "validation_fraction"),
        (["--shard-tokens", "0"], "shard_tokens: found 0"),
        (["--passkey", "1.5"], "passkey_share: found 1.5"),
    ],
)
def test_bad_options_leave_nothing(tmp_path, capsys, extra, message):
    assert synth(tmp_path / "a", *extra) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
