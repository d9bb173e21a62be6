"""The commands index, validate, stats and collect-stdlib, and the error messages for bad input."""

import functools
import gzip
import io
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from data_prep.__main__ import main
from data_prep.collect_stdlib import collect_stdlib
from data_prep.indexing import read_entries
from data_prep.shard import shard_corpus
from data_prep.stats import dataset_stats
from data_prep.train_tokenizer import train_tokenizer
from data_prep.validate import _shard_fault, validate_dataset
from infini_train.data.index import DatasetIndex

REPOSITORY = Path(__file__).parents[2]
TEXTS = {f"{i}.txt": "".join(f"memory {n} window\n" for n in range(5 * 2**i)) for i in range(6)}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/ of six documents, two tokenizers, and the dataset of three or more shards made with one."""
    root = tmp_path_factory.mktemp("made")
    (root / "corpus").mkdir()
    (root / "empty").mkdir()
    for name, text in TEXTS.items():
        (root / "corpus" / name).write_text(text)
    train_tokenizer([root / "corpus"], root / "t.model", vocab_size=290)
    train_tokenizer([root / "corpus"], root / "other.model", vocab_size=285)
    shard_corpus([root / "corpus"], root / "dataset", root / "t.model", shard_tokens=600)
    return root


@pytest.fixture
def dataset(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; its shards are writable."""
    shutil.copytree(made / "dataset", tmp_path / "dataset")
    return tmp_path / "dataset"


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "rb+") as f:
        f.seek(offset)
        f.write(data)


def test_a_whole_dataset_has_no_fault(dataset: Path) -> None:
    assert len(DatasetIndex.load(dataset).shards) >= 3
    assert validate_dataset(dataset, workers=2) == []
    assert main(["validate", str(dataset)]) == 0


def test_validate_names_the_first_fault_of_each_shard(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = DatasetIndex.load(dataset)
    first = {s: int(np.flatnonzero(index.shard_D == s)[0]) for s in range(3)}
    place = {s: (dataset / index.shards[s].name, int(index.offset_D[d])) for s, d in first.items()}
    overwrite(place[0][0], place[0][1] + 2 * 3, (9999).to_bytes(2, "little"))  # token 3 of the document
    overwrite(place[1][0], place[1][1], (5).to_bytes(2, "little"))
    path, offset = place[2]
    old = np.fromfile(path, "<u2", 1, offset=offset + 4)[0]
    overwrite(path, offset + 4, int(old ^ 1).to_bytes(2, "little"))  # another valid token
    faults = validate_dataset(dataset)
    assert len(faults) == 3
    assert faults[0].startswith("shard-00000.tar: document 0 (000000000): token 3 is 9999, outside the vocab")
    assert (
        faults[1].startswith(f"shard-00001.tar: document {first[1]}")
        and "token 0 is 5, expected BOS (1)" in faults[1]
    )
    assert faults[2].startswith("shard-00002.tar: sha256 is") and "some byte was changed" in faults[2]
    assert main(["validate", str(dataset)]) == 1
    assert all(fault in capsys.readouterr().err for fault in faults[:1])


def test_validate_missing_eos_truncated_and_lost_shards(dataset: Path) -> None:
    index = DatasetIndex.load(dataset)
    end = int(index.offset_D[0] + 2 * index.tokens_D[0])
    overwrite(dataset / "shard-00000.tar", end - 2, (7).to_bytes(2, "little"))
    os.truncate(dataset / "shard-00001.tar", 700)
    (dataset / "shard-00002.tar").unlink()
    faults = validate_dataset(dataset)
    assert "the last token is 7, expected EOS (2)" in faults[0]
    assert faults[1] == f"shard-00001.tar: 700 bytes, the index says {index.shards[1].bytes:,}"
    assert faults[2] == "shard-00002.tar: the file is missing"


def test_validate_damaged_header_and_wrong_offsets(dataset: Path) -> None:
    index = DatasetIndex.load(dataset)
    overwrite(dataset / "shard-00001.tar", 0, b"\xff" * 512)
    index.offset_D[0] += 2
    index.tokens_D[0] -= 1
    index.shards[0] = type(index.shards[0])(**{**vars(index.shards[0]), "tokens": index.shards[0].tokens - 1})
    index.save()
    faults = validate_dataset(dataset)
    assert "document 0 (000000000)" in faults[0] and "token bytes at offset" in faults[0]
    assert "truncated or is not an uncompressed tar" in faults[1]
    assert len(faults) == 2


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 37])
def test_no_byte_or_field_of_the_index_can_change(dataset: Path, step: int) -> None:
    """One bit of every byte, and every field, of index.json; every byte of index.npz."""
    path = dataset / "index.json"
    content = path.read_bytes()
    for position in range(0, len(content), step):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"index\.json"):
            DatasetIndex.load(dataset)

    def fields(value: Any, path: tuple = ()) -> Iterator[tuple]:
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, name)
            if isinstance(item, dict | list):
                yield from fields(item, (*path, name))

    for *above, name in fields(json.loads(content)):
        document = json.loads(content)
        parent = functools.reduce(lambda value, step: value[step], above, document)
        value = parent[name]
        for other in (None, 0, "0" * 64, [], value + 1 if isinstance(value, int) else f"{value}x"):
            if other != value:
                parent[name] = other
                path.write_text(json.dumps(document, indent=1) + "\n")
                with pytest.raises(ValueError, match=r"index\.json"):
                    DatasetIndex.load(dataset)
    path.write_bytes(content)
    arrays = (dataset / "index.npz").read_bytes()
    for position in range(0, len(arrays), step):
        overwrite(dataset / "index.npz", position, bytes([arrays[position] ^ 1]))
        with pytest.raises(ValueError, match=r"index_npz_sha256: found .* of .*index\.npz, expected"):
            DatasetIndex.load(dataset)
        overwrite(dataset / "index.npz", position, arrays[position : position + 1])
    assert validate_dataset(dataset) == []


def test_no_byte_of_a_shard_can_change(dataset: Path) -> None:
    index = DatasetIndex.load(dataset)
    path = dataset / index.shards[0].name
    content = path.read_bytes()
    for position in range(0, len(content), 301):
        overwrite(path, position, bytes([content[position] ^ 1]))
        assert _shard_fault(index, 0), position
        overwrite(path, position, content[position : position + 1])
    assert _shard_fault(index, 0) is None
    assert index.block_digests is not None
    index.block_digests = np.zeros_like(index.block_digests)
    assert _shard_fault(index, 0) == "the digests of its blocks in the index are wrong"


def test_files_that_are_lost_or_too_many(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(dataset / "shard-00000.tar", dataset / "shard-00099.tar")
    seen = (dataset / "seen.npz").read_bytes()
    (dataset / "seen.npz").write_bytes(seen[:-30])
    extra, damaged = validate_dataset(dataset)
    assert extra == "shard-00099.tar: the index does not list this shard"
    assert "seen.npz cannot be read, which `infini-train prep append` needs" in damaged
    (dataset / "shard-00099.tar").unlink()
    (dataset / "seen.npz").unlink()
    (lost,) = validate_dataset(dataset)
    assert "seen.npz cannot be read" in lost and "No such file" in lost
    (dataset / "seen.npz").write_bytes(seen)

    def read(path: Path) -> Iterator[Any]:
        if path.name == "shard-00000.tar":
            raise OSError(5, "Input/output error")
        return read_entries(path)

    (dataset / "shard-00001.tar").unlink()
    monkeypatch.setattr("data_prep.validate.read_entries", read)
    unreadable, missing = validate_dataset(dataset)
    assert "shard-00000.tar: [Errno 5] Input/output error" in unreadable
    assert missing == "shard-00001.tar: the file is missing"


def test_a_dataset_of_an_earlier_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It loads, and what its index cannot show is said."""
    shutil.copytree(REPOSITORY / "tests" / "fixtures" / "data", tmp_path / "data")
    assert main(["validate", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    assert "made by an earlier version" in printed and "no fault" in printed
    path = tmp_path / "data" / "index.json"
    path.write_text(path.read_text().replace('"tokens": 853', '"tokens": 854', 1))
    with pytest.raises(ValueError, match=r"found 7 documents and 853 tokens in index\.npz, expected 7 and 854"):
        DatasetIndex.load(tmp_path / "data")


def test_wrong_tokenizer_beside_the_shards(made: Path, dataset: Path) -> None:
    shutil.copy(made / "other.model", dataset / "tokenizer.model")
    (fault,) = validate_dataset(dataset)
    assert fault.startswith("tokenizer.model: sha256") and "it is another tokenizer" in fault
    with pytest.raises(ValueError, match=r"tokenizer\.model: found sha256 .* of the tokenizer that made the tokens"):
        DatasetIndex.load(dataset).check_files()


def write_foreign_shard(path: Path, documents: list[list[int]], dtype: str = "<u2") -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i, document in enumerate(documents):
            for name, content in (
                (f"a/doc-{i}.tokens.bin", np.array(document, dtype).tobytes()),
                (f"a/doc-{i}.txt", b"whatever"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_index_of_somebody_elses_shards(made: Path, tmp_path: Path) -> None:
    documents = [[1, 5, 6, 2], [1, 2], [1, 277, 2]]
    write_foreign_shard(tmp_path / "x-1.tar", documents[:2])
    write_foreign_shard(tmp_path / "x-2.tar", documents[2:])
    assert main(["index", str(tmp_path), "--tokenizer", str(made / "t.model")]) == 0
    index = DatasetIndex.load(tmp_path)
    index.check_files()
    found = [
        np.fromfile(tmp_path / index.shards[s].name, "<u2", n, offset=o).tolist()
        for s, o, n in zip(index.shard_D, index.offset_D, index.tokens_D, strict=True)
    ]
    assert found == documents
    assert validate_dataset(tmp_path) == []


@pytest.mark.parametrize(
    ("documents", "dtype", "message"),
    [
        ([[1, 5, 2], [1, 400, 2]], "<u2", "doc-1: token 1 is 400, outside the vocabulary of 290"),
        ([[5, 5, 2]], "<u2", "doc-0: token 0 is 5, expected BOS"),
        ([[1, 5]], "<u2", "the last token is 5, expected EOS"),
        ([[1]], "<u2", "1 tokens, too few"),
        ([[1, 5, 2]], "<u4", "expected EOS"),
        ([[1, 5, 2]], "u1", "3 bytes are not a whole number of 2-byte tokens"),
    ],
)
def test_index_refuses_what_cannot_be(
    made: Path, tmp_path: Path, documents: list, dtype: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_foreign_shard(tmp_path / "x.tar", documents, dtype)
    assert main(["index", str(tmp_path), "--tokenizer", str(made / "t.model")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_index_refuses_other_tokenizer_truncated_tar_and_existing_index(
    made: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = ["index", str(dataset), "--tokenizer", str(made / "t.model")]
    fingerprint = DatasetIndex.load(dataset).fingerprint
    assert main(index) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main([*index, "--overwrite"]) == 0
    assert DatasetIndex.load(dataset).fingerprint == fingerprint
    assert main([*index[:-1], str(made / "other.model"), "--overwrite"]) == 2
    assert "shard-00000.tar, document 000000000: made with tokenizer" in capsys.readouterr().err
    os.truncate(dataset / "shard-00001.tar", 2000)
    assert main([*index, "--overwrite"]) == 2
    assert "shard-00001.tar is truncated" in capsys.readouterr().err


def test_stats_against_counting_by_hand(made: Path, tmp_path: Path) -> None:
    segment = 50
    peer = sentencepiece.SentencePieceProcessor(model_file=str(made / "t.model"))
    documents = [[*peer.encode(text), 2] for text in TEXTS.values()]  # the labels: all but BOS
    counts = Counter(token for document in documents for token in document)
    labels = sum(counts.values())
    lengths = [len(document) + 1 for document in documents]
    text_bytes = sum(len(text.encode()) for text in TEXTS.values())

    files = ["--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    assert main(["stats", str(made / "dataset"), "--segment-length", "50", *files]) == 0
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    stats = json.loads((tmp_path / "s.json").read_text())
    assert stats == dataset_stats(made / "dataset", segment, workers=2)
    assert (stats["documents"], stats["tokens"], stats["labels"]) == (6, sum(lengths), labels)
    assert (stats["bytes"], stats["bytes_per_token"]) == (text_bytes, text_bytes / labels)
    entropy = -math.fsum(n / labels * math.log(n / labels) for n in counts.values())
    assert stats["unigram_entropy"] == pytest.approx(entropy, rel=1e-12)
    assert stats["tokens_seen"] == len(counts)
    assert stats["document_tokens"]["max"] == max(lengths)

    assert sum(row["documents"] for row in stats["histogram"]) == 6
    for row in stats["histogram"]:
        low, high = row["segments"]
        inside = [n for n in lengths if low <= math.ceil(n / segment) <= high]
        assert (row["documents"], row["tokens"]) == (len(inside), sum(inside))
    for n, share in stats["token_share_longer_than"].items():
        longer = sum(length for length in lengths if length > int(n) * segment)
        assert share == longer / sum(lengths)
    assert 0 < stats["token_share_longer_than"]["4"] < 1
    words = sum(len(text.split()) for text in TEXTS.values())
    assert stats["fertility"] == (labels - 6) / words  # EOS belongs to no word
    assert stats["duplicates"] == 0
    assert sum(stats["sources"].values()) == sum(lengths)


def test_stats_of_duplicates_and_sources_and_short_documents(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = {
        "a/one.txt": "one two three",
        "a/two.txt": "four five",
        "b/three.txt": "one two",
        "b/c/four.txt": "six",
    }
    for name, text in texts.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    model, out = tmp_path / "t.model", tmp_path / "out"
    assert main(["tokenizer", str(tmp_path / "in"), "--out", str(model), "--vocab-size", "290"]) == 0
    inputs = [str(tmp_path / "in" / name) for name in ("a", "b")]
    assert main(["shard", *inputs, "--tokenizer", str(model), "--out", str(out)]) == 0
    (out / "shard-00001.tar").write_bytes((out / "shard-00000.tar").read_bytes())  # a duplicate
    assert main(["index", str(out), "--tokenizer", str(model), "--overwrite"]) == 0
    stats = dataset_stats(out, 2048)
    peer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    count = {name: len(peer.encode(text)) + 2 for name, text in texts.items()}
    assert stats["duplicates"] == 4
    assert stats["sources"] == {
        part: 2 * sum(n for name, n in count.items() if name.startswith(part)) for part in ("a", "b")
    }
    assert main(["stats", str(out)]) == 0
    assert "warning: 0% of the tokens are in documents longer than 4 segments of 2,048" in capsys.readouterr().err


def test_collect_stdlib(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    files = {
        "zlast.py": "z = 1\n",
        "pkg/__init__.py": "",
        "pkg/b.py": "b = 'ü'\n",
        "pkg/a.py": "a = 1",
        "pkg/sub/c.py": "c = 1",
        "pkg/tests/test_a.py": "no",
        "pkg/data.txt": "no",
        "test/test_x.py": "no",
        "site-packages/x.py": "no",
        "__pycache__/y.py": "no",
        "empty/data.txt": "no",
    }
    for name, text in files.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(text)
    (library / "latin.py").write_bytes(b"# \xfc")
    output = tmp_path / "out" / "stdlib.jsonl.gz"
    collect_stdlib(output, library)
    with gzip.open(output) as f:
        documents = [json.loads(line) for line in f]
    assert documents == [
        {
            "id": "pkg",
            "text": "# file: pkg/a.py\na = 1\n# file: pkg/b.py\nb = 'ü'\n# file: pkg/sub/c.py\nc = 1\n",
        },
        {"id": "zlast", "text": "# file: zlast.py\nz = 1\n"},
    ]
    assert output.read_bytes()[4:8] == bytes(4)  # gzip's modification time is zero
    before = output.stat()
    collect_stdlib(output, library)
    assert output.stat().st_ino == before.st_ino  # the same bytes are not written again
    collect_stdlib(tmp_path / "again.jsonl.gz", library)
    assert (tmp_path / "again.jsonl.gz").read_bytes() == output.read_bytes()
    with pytest.raises(ValueError, match="no Python sources"):
        collect_stdlib(output, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenizer", "MADE/nowhere", "--out", "TMP/t.model"], "input MADE/nowhere does not exist"),
        (["tokenizer", "MADE/empty", "--out", "TMP/t.model"], "no files in MADE/empty"),
        (["tokenizer", "MADE/corpus", "--out", "TMP/t.model"], "vocab_size 32000 is too large for so little text"),
        (
            ["tokenizer", "MADE/corpus", "--out", "TMP/t.model", "--vocab-size", "-1"],
            "vocab_size: found -1, expected more than 259",
        ),
        (["shard", "MADE/corpus", "--tokenizer", "TMP/t", "--out", "TMP/o"], "tokenizer TMP/t does not exist"),
        (["shard", "MADE/corpus", "--tokenizer", "MADE/corpus/1.txt", "--out", "TMP/o"], "not a sentencepiece"),
        (["shard", "MADE/none", "--tokenizer", "MADE/t.model", "--out", "TMP/o"], "MADE/none does not exist"),
        (["shard", "MADE/empty", "--tokenizer", "MADE/t.model", "--out", "TMP/o"], "no files in MADE/empty"),
        (
            ["shard", "MADE/corpus", "--tokenizer", "MADE/t.model", "--out", "MADE/t.model"],
            "not a dataset that `infini-train prep` made",
        ),
        (["shard", "MADE/corpus", "--tokenizer", "MADE/t.model", "--out", "MADE/t.model/o"], "MADE/t.model"),
        (["shard", "MADE/corpus", "--tokenizer", "MADE/t.model", "--out", "/proc/o"], "/proc/"),
        (["shard", "MADE/corpus", "--tokenizer", "MADE/t.model", "--out", "TMP/o", "--workers", "0"], "workers"),
        (
            ["shard", "MADE/corpus", "--tokenizer", "MADE/t.model", "--out", "TMP/o", "--validation-fraction", "1"],
            "validation_fraction: found 1.0, expected at least 0 and below 1",
        ),
        (["tokenizer", "MADE", "--out", "MADE/new.model"], "output MADE/new.model lies in the input MADE"),
        (["tokenizer", "/dev/zero", "--out", "TMP/t.model"], "/dev/zero is neither a file nor a directory"),
        (["shard", "MADE", "--tokenizer", "MADE/t.model", "--out", "MADE/new"], "lies in the input MADE"),
        (["index", "TMP", "--tokenizer", "MADE/t.model"], "no .tar shards in TMP"),
        (["index", "MADE/none", "--tokenizer", "MADE/t.model"], "no .tar shards in MADE/none"),
        (["validate", "MADE/corpus"], "MADE/corpus: found no index.json"),
        (["stats", "MADE/none"], "MADE/none: found no directory"),
        (["stats", "MADE/dataset", "--segment-length", "0"], "segment_length: found 0, expected at least 1"),
        (["collect-stdlib", "TMP/a.txt"], "output: found a.txt, expected a name that ends in .jsonl.gz"),
        (["collect-stdlib", "/proc/a.jsonl.gz"], "/proc/"),
    ],
)
def test_bad_input_is_one_line(
    made: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill_in(text: str) -> str:
        return text.replace("MADE", str(made)).replace("TMP", str(tmp_path))

    assert main([fill_in(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"data_prep {arguments[0]}: error: ")
    assert fill_in(message) in lines[0]
    assert not list(tmp_path.iterdir())


def test_no_room_for_the_output(made: Path, tmp_path: Path) -> None:
    """A file size limit simulates a full disk: both make write() fail half-way."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    arguments = ["shard", made / "corpus", "--tokenizer", made / "t.model", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", *map(str, arguments)],
        cwd=REPOSITORY,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "error:" in done.stderr and "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    shard_corpus([made / "corpus"], tmp_path / "out", made / "t.model")  # without the limit
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
