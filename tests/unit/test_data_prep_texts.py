"""A text that is read in chunks becomes what all of it would become at once."""

import gzip
import json
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_prep.texts as texts
import infini_train.tokenizer.cutting as cutting
from data_prep.shard import shard_corpus
from data_prep.summary import Summary
from data_prep.texts import BadText, TextReader, UnicodeForm, starts_anew
from tests.helpers.corpora import all_bytes, text, trained_tokenizer

FORMS: list[UnicodeForm] = ["NFC", "NFKC", "none"]
# Characters that normalising composes, decomposes or reorders, with each other or not.
PARTS = ["\r\n", "e\u0301", *"a \r\n\u0301\u0323\u1100\u1161\u11a8\uac00\u304c\u3099\uff76\uff9e\u09c7\u09be"]
PARTS += ["\u2126", "\u0344", "\u8a9e", "\ufb01", "\ufeff", "\U000110b9", "\U0001f600"]
TEXT = st.lists(st.sampled_from(PARTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)).map("".join)


def pieces(content: bytes, draw: random.Random) -> list[bytes]:
    places = sorted(draw.choices(range(len(content) + 1), k=4))
    return [content[i:k] for i, k in zip([0, *places], [*places, len(content)], strict=True)]


@settings(max_examples=150, deadline=None)
@given(TEXT, st.sampled_from(FORMS), st.booleans(), st.randoms(use_true_random=False))
def test_chunks_equal_the_whole(content: str, form: UnicodeForm, keep: bool, draw: random.Random) -> None:
    expected = content if form == "none" else content.removeprefix("\ufeff")
    expected = expected if keep else expected.replace("\r\n", "\n").replace("\r", "\n")
    expected = expected if form == "none" else unicodedata.normalize(form, expected)
    summary = Summary()
    summary.begin("text")
    reader = TextReader(form, "keep" if keep else "lf", 1 << 20, summary)
    # Empty parts would end a file.
    chunks = iter([part for part in pieces(content.encode(), draw) if part])
    if "\0" in content or not content.removeprefix("\ufeff" if form != "none" else "").strip():
        with pytest.raises(BadText):
            "".join(reader.text_of(chunks))
        assert not summary.kinds["text"]["documents"]
    else:
        assert "".join(reader.text_of(chunks)) == expected
        assert summary.kinds["text"]["documents"] == 1
        assert bool(summary.changes) == (expected != content)


def test_places_where_a_text_is_normalised_in_two_parts() -> None:
    """No character that `starts_anew` allows is the second of a composition, or begins with such a character."""
    composed = set()
    for number in range(0x110000):
        parts = unicodedata.decomposition(chr(number)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            composed.add(chr(int(parts[1], 16)))
    composed |= {chr(number) for number in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}  # of syllables of Hangul
    for character in map(chr, range(0x110000)):
        changes = unicodedata.decomposition(character) or unicodedata.combining(character)
        if (changes or character in composed) and starts_anew(character):
            for form in ("NFD", "NFKD"):
                first = unicodedata.normalize(form, character)[0]
                assert first not in composed and not unicodedata.combining(first), hex(ord(character))


FAULTY = {
    "nul.txt": ("ok " * 100 + "\0" + "x" * 100).encode(),
    "not_utf8.txt": ("ok ü " * 100).encode() + b"\xff" + b"x" * 100,
    "cut_character.txt": ("ok " * 100 + "ü").encode()[:-1],
    "blank.txt": b" \n" * 200,
    "marks.txt": ("e" + "\u0301\u0323" * 300).encode(),
    "lines.txt": b"one\r\ntwo\r" * 100,
    "bom.txt": ("\ufeff" + "word " * 100).encode(),
}


@pytest.mark.parametrize("join", [None, "directory"])
def test_shards_do_not_depend_on_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, join: str | None) -> None:
    """Long texts, broken ones among them, of which nothing is left in the next document, give the same dataset."""
    tokenizer = trained_tokenizer(tmp_path)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, content in FAULTY.items():
        (corpus / name).write_bytes(content)
        (corpus / f"after-{name}").write_text(text(len(name), 300) + name)
    cut = gzip.compress(random.Random(0).randbytes(500).hex().encode())
    (corpus / "cut.txt.gz").write_bytes(cut[: len(cut) // 2])
    lines = [json.dumps({"text": text(n, 200), "id": n}) for n in range(3)] + [json.dumps({"text": "a" * 200 + "\0"})]
    (corpus / "lines.jsonl").write_text("\n".join(lines))
    shard_corpus([corpus], tmp_path / "whole", tokenizer, join=join)
    monkeypatch.setattr(texts, "CHUNK", 64)
    for module in ("records", "found"):
        monkeypatch.setattr(f"data_prep.{module}.CHUNK", 64)
    for name, characters in {"PIECE": 20, "CONTEXT": 16, "LIMIT": 60}.items():  # tokens are written before a fault
        monkeypatch.setattr(cutting, name, characters)
    shard_corpus([corpus], tmp_path / "chunks", tokenizer, join=join)
    reasons = [
        {one["id"]: one["reason"] for one in map(json.loads, (tmp_path / out / "rejects.jsonl").open())}
        for out in ("whole", "chunks")
    ]
    assert reasons[0] == reasons[1]
    assert sorted(reasons[0].values()) == ["empty", "not_utf8", "not_utf8", "nul_bytes", "nul_bytes", "unreadable"]
    datasets = [all_bytes(tmp_path / out) for out in ("whole", "chunks")]
    for dataset in datasets:
        del dataset["rejects.jsonl"]  # whose details tell how far a cut file was read
    assert datasets[0] == datasets[1]
