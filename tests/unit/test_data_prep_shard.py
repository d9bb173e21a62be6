"""Shards are checked with tarfile, webdataset and sentencepiece, independently of our own code."""

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import webdataset

from data_prep.documents import Document, DocumentReader, Reject
from data_prep.indexing import index_shards
from data_prep.shard import append_corpus, shard_corpus
from data_prep.sources import find_inputs
from data_prep.validate import validate_dataset
from data_prep.work import Work
from infini_train.data.index import DatasetIndex
from infini_train.files import new_directory
from tests.helpers.corpora import all_bytes, read_with_tarfile, text, trained_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """30 good documents in text files, jsonl (plain, gz, zst) and parquet."""
    root = tmp_path / "corpus"
    (root / "below").mkdir(parents=True)
    for i in range(10):
        (root / "below" / f"{i}.txt").write_text(text(i, 50 * (i + 1)))
    for name, first, compression in (("a", 10, None), ("b", 15, "gzip"), ("c", 20, "zstd")):
        lines = [json.dumps({"id": f"doc{i}", "text": text(i, 100)}) + "\n" for i in range(first, first + 5)]
        suffix = {None: "", "gzip": ".gz", "zstd": ".zst"}[compression]
        with pa.output_stream(str(root / f"{name}.jsonl{suffix}"), compression=compression) as f:
            f.write("".join(lines).encode())
    texts = [text(i, 100) for i in range(25, 30)]
    pq.write_table(pa.table({"text": texts, "id": [f"doc{i}" for i in range(25, 30)]}), root / "d.parquet")
    return root


def expected_documents() -> dict[str, str]:
    below = {f"corpus/below/{i}.txt": text(i, 50 * (i + 1)) for i in range(10)}
    return below | {f"doc{i}": text(i, 100) for i in range(10, 30)}


def test_documents_are_what_sentencepiece_says(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    shard_corpus([corpus], tmp_path / "out", tokenizer_path, shard_tokens=3000)
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    sha256 = hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    expected = expected_documents()
    documents = read_with_tarfile(tmp_path / "out")
    assert sorted(about["id"] for about, _ in documents) == sorted(expected)
    for about, tokens in documents:
        assert tokens == [1, *peer.encode(expected[about["id"]]), 2]
        assert about["tokens"] == len(tokens)
        assert about["tokenizer_sha256"] == sha256
    assert documents[0][0]["source"] == "corpus/a.jsonl"
    assert (tmp_path / "out" / "rejects.jsonl").read_bytes() == b""

    # the index finds the same tokens by offset, without tarfile
    index = DatasetIndex.load(tmp_path / "out")
    index.check_files()
    found = [
        np.fromfile(index.root / index.shards[s].name, "<u2", n, offset=o).tolist()
        for s, o, n in zip(index.shard_D, index.offset_D, index.tokens_D, strict=True)
    ]
    assert found == [tokens for _, tokens in documents]
    assert [shard.sha256 for shard in index.shards] == [
        hashlib.sha256((index.root / shard.name).read_bytes()).hexdigest() for shard in index.shards
    ]
    assert len(index.shards) > 3
    assert all(shard.tokens <= 3000 or shard.documents == 1 for shard in index.shards)


def test_webdataset_reads_the_shards(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    shard_corpus([corpus], tmp_path / "out", tokenizer_path)
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-00000.tar"), shardshuffle=False))
    expected = read_with_tarfile(tmp_path / "out")
    assert [np.frombuffer(s["tokens.bin"], "<u2").tolist() for s in samples] == [t for _, t in expected]
    assert [json.loads(s["json"]) for s in samples] == [about for about, _ in expected]


def test_split_follows_the_hash_of_the_id(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    shard_corpus([corpus], tmp_path / "out", tokenizer_path, validation_fraction=0.3)
    ids = {
        part: {about["id"] for about, _ in read_with_tarfile(tmp_path / "out" / part)} for part in ("train", "valid")
    }
    by_hash = {
        id for id in expected_documents() if int(hashlib.sha256(id.encode()).hexdigest()[:16], 16) < 0.3 * 2**64
    }
    assert 3 < len(by_hash) < 16
    assert ids["valid"] == by_hash
    assert ids["train"] == set(expected_documents()) - by_hash
    assert not (tmp_path / "out" / "index.json").exists()


def test_split_always_has_a_validation_document(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    shard_corpus([corpus], tmp_path / "out", tokenizer_path, validation_fraction=1e-9)
    lowest = min(expected_documents(), key=lambda id: hashlib.sha256(id.encode()).hexdigest())
    assert [about["id"] for about, _ in read_with_tarfile(tmp_path / "out" / "valid")] == [lowest]
    train = [about["id"] for about, _ in read_with_tarfile(tmp_path / "out" / "train")]
    assert sorted(train) == sorted(set(expected_documents()) - {lowest})
    with pytest.raises(ValueError, match=r"a single document, too few to split .none is left for train., in"):
        shard_corpus([corpus / "below" / "1.txt"], tmp_path / "1", tokenizer_path, validation_fraction=0.5)
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_a_test_part_has_the_hashes_above_those_of_validation(
    validation: float, corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    out, more = tmp_path / "out", tmp_path / "more"
    split: dict[str, Any] = {"validation_fraction": validation, "test_fraction": 0.3}
    shard_corpus([corpus], out, tokenizer_path, **split)
    more.mkdir()
    for number in range(30):
        (more / f"more{number}.txt").write_text(f"new {number}")
    append_corpus([more], out)
    ids = [*expected_documents(), *(f"more/more{number}.txt" for number in range(30))]
    ranks = {id: int(hashlib.sha256(id.encode()).hexdigest()[:16], 16) / 2**64 for id in ids}
    expected = {
        "valid": {id for id, rank in ranks.items() if rank < validation},
        "test": {id for id, rank in ranks.items() if validation <= rank < validation + 0.3},
        "train": {id for id, rank in ranks.items() if rank >= validation + 0.3},
    }
    parts = {"train", "test"} | ({"valid"} if validation else set())
    assert {path.name for path in out.iterdir() if path.is_dir()} == parts
    for part in parts:
        assert {about["id"] for about, _ in read_with_tarfile(out / part)} == expected[part] != set()
        assert not validate_dataset(out / part)


def test_every_part_has_a_document(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    shard_corpus([corpus], tmp_path / "out", tokenizer_path, validation_fraction=1e-9, test_fraction=1e-9)
    by_hash = sorted(expected_documents(), key=lambda id: hashlib.sha256(id.encode()).hexdigest())
    for part, expected in (("valid", by_hash[:1]), ("test", by_hash[1:2]), ("train", by_hash[2:])):
        found = [about["id"] for about, _ in read_with_tarfile(tmp_path / "out" / part)]
        assert sorted(found) == sorted(expected)
    two = [corpus / "below" / "1.txt", corpus / "below" / "2.txt"]
    with pytest.raises(ValueError, match=r"2 documents, too few to split \(none is left for train\), in"):
        shard_corpus(two, tmp_path / "2", tokenizer_path, validation_fraction=1e-9, test_fraction=1e-9)
    with pytest.raises(ValueError, match=r"validation_fraction [+] test_fraction: found 1.1, expected below 1"):
        shard_corpus(two, tmp_path / "2", tokenizer_path, validation_fraction=0.5, test_fraction=0.6)
    assert not (tmp_path / "2").exists()


def test_every_kind_of_reject(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "empty.txt").write_text("")
    (corpus / "blank.txt").write_text(" \n\t\n")
    (corpus / "latin1.txt").write_bytes("Zürich".encode("latin1"))
    (corpus / "good.txt").write_text("memory good")
    (corpus / "bom.md").write_bytes(b"\xef\xbb\xbfwindow bom")
    good = [json.dumps({"text": "memory " * 50 + str(i)}) for i in range(200)]
    lines = [
        '{"text": "memory", "id": 7}',
        '{"text": "half a rec',
        '{"title": "no text"}',
        '{"text": 5, "id": "five"}',
        '{"text": null}',
        "[1, 2]",
        '{"text": "\\ud800"}',
        '{"text": ""}',
        "",
        '{"text": "window"}',
        '{"text": "memory strange", "id": "\\ud800"}',  # an unusual id does not make a document unreadable
    ]
    (corpus / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    for name, compression in (("cut.jsonl.gz", "gzip"), ("cut.jsonl.zst", "zstd")):
        with pa.output_stream(str(corpus / name), compression=compression) as f:
            f.write("\n".join(good).encode())
        os.truncate(corpus / name, (corpus / name).stat().st_size - 20)
    (corpus / "no.parquet").write_bytes(b"not parquet")
    pq.write_table(pa.table({"body": ["x"]}), corpus / "other.parquet")
    pq.write_table(pa.table({"text": [3, 4]}), corpus / "numbers.parquet")
    pq.write_table(pa.table({"text": ["memory null", None]}), corpus / "null.parquet")
    (corpus / ".hidden").write_text("not read")

    shard_corpus([corpus], tmp_path / "out", tokenizer_path, workers=2)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    found = {(reject["id"].removeprefix("corpus/"), reject["reason"]) for reject in rejects}
    assert found == {
        ("empty.txt", "empty"),
        ("blank.txt", "empty"),
        ("latin1.txt", "not_utf8"),
        ("a.jsonl:2", "bad_json"),
        ("a.jsonl:3", "no_text_field"),
        ("five", "text_not_a_string"),
        ("a.jsonl:5", "text_not_a_string"),
        ("a.jsonl:6", "bad_json"),
        ("a.jsonl:7", "not_utf8"),
        ("a.jsonl:8", "empty"),
        ("a.jsonl:12", "not_utf8"),
        ("cut.jsonl.gz", "unreadable"),
        ("cut.jsonl.zst", "unreadable"),
        ("no.parquet", "unreadable"),
        ("other.parquet", "no_text_field"),
        ("numbers.parquet:1", "text_not_a_string"),
        ("numbers.parquet:2", "text_not_a_string"),
        ("null.parquet:2", "text_not_a_string"),
    }
    assert len(rejects) == len(found)
    counts = Counter(reason for _, reason in found)
    printed = capsys.readouterr().out
    assert all(f"{count} {reason}" in printed for reason, count in counts.items())

    peer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    kept = {about["id"]: peer.decode(tokens[1:-1]) for about, tokens in read_with_tarfile(tmp_path / "out")}
    alone = {"corpus/good.txt": "memory good", "corpus/bom.md": "window bom", "7": "memory"}
    alone |= {"\ud800": "memory strange", "corpus/a.jsonl:10": "window", "corpus/null.parquet:1": "memory null"}
    assert {id: kept[id] for id in alone} == alone
    # documents before the truncation are kept
    assert any(id.startswith("corpus/cut.jsonl.gz:") for id in kept)
    assert not {".hidden"} & {about["source"] for about, _ in read_with_tarfile(tmp_path / "out")}


def test_reader_order_and_progress(corpus: Path) -> None:
    reader = DocumentReader(find_inputs([corpus], Path("elsewhere")), "text", "id")
    items = list(reader)
    assert not [item for item in items if isinstance(item, Reject)]
    sources = [item.source for item in items if isinstance(item, Document)]
    assert sources == sorted(sources)
    assert reader.bytes_read == reader.bytes_total == sum(f.stat().st_size for f in corpus.rglob("*.*"))


@pytest.mark.parametrize("content", [[], ["", " "]])
def test_empty_corpus(tmp_path: Path, tokenizer_path: Path, content: list[str]) -> None:
    (tmp_path / "corpus").mkdir()
    for i, part in enumerate(content):
        (tmp_path / "corpus" / f"{i}.txt").write_text(part)
    message = r"no document in .*\(2 empty left out\)" if content else "no files in"
    with pytest.raises(ValueError, match=message):
        shard_corpus([tmp_path / "corpus"], tmp_path / "out", tokenizer_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_finished_output_is_kept_or_refused(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shard_corpus([corpus], out, tokenizer_path, validation_fraction=0.3)
    before = all_bytes(out)
    inode = (out / "train" / "index.json").stat().st_ino
    shard_corpus([corpus], out, tokenizer_path, validation_fraction=0.3, workers=2, overwrite=True)
    assert "nothing to do" in capsys.readouterr().out
    assert (out / "train" / "index.json").stat().st_ino == inode
    with pytest.raises(ValueError, match=r"other options \(validation_fraction\): give --overwrite"):
        shard_corpus([corpus], out, tokenizer_path)
    (corpus / "a.jsonl").write_text('{"text": "memory"}')
    with pytest.raises(ValueError, match=r"other options \(inputs\)"):
        shard_corpus([corpus], out, tokenizer_path, validation_fraction=0.3)
    assert all_bytes(out) == before
    shard_corpus([corpus], out, tokenizer_path, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["index.json", "index.npz", "rejects.jsonl", "seen.npz", "shard-00000.tar", "tokenizer.model"]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "out"]


def test_damaged_output_is_made_again_when_asked(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard_corpus([corpus], out, tokenizer_path, validation_fraction=0.3)
    before = all_bytes(out)
    os.truncate(out / "valid" / "shard-00000.tar", 1000)
    with pytest.raises(ValueError, match=r"is damaged \(.*shard-00000.tar: found 1,000 bytes.*give --overwrite"):
        shard_corpus([corpus], out, tokenizer_path, validation_fraction=0.3)
    shutil.rmtree(out / "valid")
    with pytest.raises(ValueError, match="has lost one of its parts, train and valid: give --overwrite"):
        shard_corpus([corpus], out, tokenizer_path, validation_fraction=0.3)
    shard_corpus([corpus], out, tokenizer_path, validation_fraction=0.3, overwrite=True)
    assert all_bytes(out) == before


def test_what_is_not_ours_is_never_replaced(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a dataset that `infini-train prep` made"):
        shard_corpus([corpus], out, tokenizer_path, overwrite=True)
    (out / "thesis.tex").unlink()
    shard_corpus([corpus], out, tokenizer_path)
    (out / "notes").mkdir()
    (out / "notes" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"not a dataset that `infini-train prep` made, it holds .*thesis\.tex"):
        shard_corpus([corpus], out, tokenizer_path, shard_tokens=1000, overwrite=True)
    shutil.rmtree(out / "notes")
    index_shards(out, tokenizer_path, overwrite=True)  # as for shards that another program wrote
    with pytest.raises(ValueError, match="not a dataset that `infini-train prep` made"):
        shard_corpus([corpus], out, tokenizer_path, shard_tokens=1000, overwrite=True)


def test_two_runs_at_once(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out"), pytest.raises(ValueError, match="another run is writing to"):  # of `synth`
        new_directory(tmp_path / "out", replace=True).__enter__()
    work = Work(tmp_path / "out", {}, 1)
    with work.alone(), pytest.raises(ValueError, match="another run is writing to"):
        Work(tmp_path / "out", {}, 1).alone().__enter__()
