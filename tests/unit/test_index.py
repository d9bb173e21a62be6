import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infini_train.data.index import DatasetIndex, Shard
from infini_train.files import atomic_file, sha256_of_file, sync, write_file


@pytest.fixture
def index(tmp_path: Path) -> DatasetIndex:
    """Two raw "shards" with three documents of 4, 2 and 5 tokens at hand-chosen offsets."""
    root = tmp_path / "dataset"
    root.mkdir()
    documents = [[1, 7, 8, 2], [1, 2], [1, 9, 9, 9, 2]]
    (root / "a.tar").write_bytes(b"xxxx" + np.array(documents[0] + documents[1], "<u2").tobytes() + b"yy")
    (root / "b.tar").write_bytes(b"zzz" + np.array(documents[2], "<u2").tobytes())
    (root / "tokenizer.model").write_bytes(b"a tokenizer")
    shards = [
        Shard(name, (root / name).stat().st_size, sha256_of_file(root / name), count, tokens)
        for name, count, tokens in (("a.tar", 2, 6), ("b.tar", 1, 5))
    ]
    return DatasetIndex(
        root=root,
        tokenizer_file="tokenizer.model",
        tokenizer_sha256=sha256_of_file(root / "tokenizer.model"),
        vocab_size=300,
        bos_id=1,
        eos_id=2,
        dtype=np.uint16,
        shards=shards,
        shard_D=np.array([0, 0, 1], np.int32),
        offset_D=np.array([4, 12, 3], np.int64),
        tokens_D=np.array([4, 2, 5], np.int64),
        options={"inputs": "x"},
    )


def test_round_trip_and_reading_by_offset(index: DatasetIndex) -> None:
    index.save()
    loaded = DatasetIndex.load(index.root)
    assert (loaded.documents, loaded.total_tokens) == (3, 11)
    assert loaded.shards == index.shards
    assert loaded.options == index.options
    assert loaded.shard_D.dtype == np.int32
    assert loaded.offset_D.dtype == loaded.tokens_D.dtype == np.int64
    read = [
        np.fromfile(loaded.root / loaded.shards[s].name, loaded.dtype, n, offset=o).tolist()
        for s, o, n in zip(loaded.shard_D, loaded.offset_D, loaded.tokens_D, strict=True)
    ]
    assert read == [[1, 7, 8, 2], [1, 2], [1, 9, 9, 9, 2]]
    loaded.check_files()
    stated = json.loads((index.root / "index.json").read_text())
    assert stated["fingerprint"] == loaded.fingerprint == index.fingerprint


def test_fingerprint_follows_the_data_and_nothing_else(index: DatasetIndex) -> None:
    same = [
        replace(index, options={}),
        replace(index, root=Path("/elsewhere")),
        replace(index, tokenizer_file="other.model"),
    ]
    assert {other.fingerprint for other in same} == {index.fingerprint}
    shards = [replace(index.shards[0], sha256="0" * 64), index.shards[1]]
    different = [
        replace(index, tokens_D=np.array([4, 3, 5])),
        replace(index, tokens_D=np.array([2, 4, 5])),
        replace(index, offset_D=np.array([4, 14, 3])),
        replace(index, shards=shards),
        replace(index, shards=index.shards[::-1]),
        replace(index, tokenizer_sha256="0" * 64),
        replace(index, dtype=np.uint32),
    ]
    assert len({other.fingerprint for other in [index, *different]}) == 1 + len(different)


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found no index.json, expected a dataset that `infini-train prep`"):
        DatasetIndex.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere: found no directory, expected a dataset"):
        DatasetIndex.load(tmp_path / "nowhere")
    for part in ("valid", "train"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=rf"such as {tmp_path}/train, {tmp_path}/valid$"):
        DatasetIndex.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, "version: found 2, expected 1"),
        ("dtype", "int8", r"dtype: found 'int8', expected one of \['uint16', 'uint32'\]"),
        ("vocab_size", None, "found no field 'vocab_size', expected"),
        ("bos_id", 300, "bos_id, eos_id: found 300 and 2, expected 0 to 299"),
        ("vocab_size", 70000, "vocab_size: found 70000, expected at most 65536 in uint16"),
        ("shards", [], "found no documents, expected at least one"),
        ("index_npz_sha256", "0", r"index_npz_sha256: found \w{12}\.\.\. of .*index.npz, expected 0\.\.\."),
    ],
)
def test_damaged_json(index: DatasetIndex, field: str, value: object, message: str) -> None:
    index.save()
    path = index.root / "index.json"
    document = json.loads(path.read_text())
    document[field] = value
    if value is None:
        del document[field]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as error:
        DatasetIndex.load(index.root)
    assert "index.json" in str(error.value)


def test_half_an_index_json(index: DatasetIndex) -> None:
    index.save()
    path = index.root / "index.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"index\.json"):
        DatasetIndex.load(index.root)


def test_index_npz_of_another_run(index: DatasetIndex) -> None:
    index.save()
    other = replace(index, offset_D=np.array([4, 10, 3]), root=index.root / "other")
    other.root.mkdir()
    other.save()
    (index.root / "index.npz").write_bytes((other.root / "index.npz").read_bytes())
    with pytest.raises(ValueError, match="damaged or of another run"):
        DatasetIndex.load(index.root)
    (index.root / "index.npz").unlink()
    with pytest.raises(ValueError, match=r"index_npz: found no file .*index\.npz, expected"):
        DatasetIndex.load(index.root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"shard_D": np.array([0, 1], np.int32)},
            r"found arrays of lengths \[2, 3\] in index.npz, expected one length",
        ),
        ({"shard_D": np.array([0, 0, 2], np.int32)}, "document 2: found shard 2, expected 0 to 1"),
        ({"shard_D": np.zeros(3, np.int32)}, "a.tar: found 3 documents and 11 tokens in index.npz, expected 2 and 6"),
        ({"tokens_D": np.array([5, 1, 5])}, "document 1: found 1 tokens, expected at least 2, BOS and EOS"),
        (
            {"offset_D": np.array([4, 16, 3])},
            "document 1: found bytes 16 to 20, expected bytes from 0 to 18, those of its shard",
        ),
        (
            {"offset_D": np.array([-4, 12, 3])},
            "document 0: found bytes -4 to 4, expected bytes from 0 to 18, those of its shard",
        ),
    ],
)
def test_contradictions_are_refused(index: DatasetIndex, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(index, **change).save()
    assert not (index.root / "index.json").exists()


def test_check_files(index: DatasetIndex) -> None:
    (index.root / "tokenizer.model").write_bytes(b"another one")
    with pytest.raises(
        ValueError, match=r"tokenizer\.model: found sha256 .*, expected .*, that of the tokenizer that made"
    ):
        index.check_files()
    with open(index.root / "b.tar", "rb+") as f:
        f.truncate(8)
    with pytest.raises(ValueError, match=r"b\.tar: found 8 bytes, expected 13 by index\.json"):
        index.check_files()
    (index.root / "a.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.tar: found no file, expected the shard"):
        index.check_files()


def test_atomic_file_leaves_the_old_file_when_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as f:
        f.write(b"old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as f:  # noqa: PT012
        f.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fails_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors of fsync and write know only the number of an open file."""
    path = tmp_path / "file"
    write_file(path, b"old")
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'"), atomic_file(path) as f:  # noqa: PT012
        f.write(b"new")
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.read(tmp_path_file, 1))
        tmp_path_file = os.open(tmp_path, os.O_RDONLY)
        for act in (lambda: sync(path), lambda: write_file(path, b"new")):
            with pytest.raises(OSError, match=r"Is a directory: '.*/file'"):
                act()
        os.close(tmp_path_file)
    assert path.read_bytes() == b"old"


def test_a_file_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, into_place = tmp_path / "file", os.replace

    def lying(source: str, target: Path) -> None:
        into_place(source, target)
        target.write_bytes(b"nev")

    monkeypatch.setattr(os, "replace", lying)
    with pytest.raises(OSError, match="file: could not be written: what was read back is not what was written"):
        write_file(path, b"new")
