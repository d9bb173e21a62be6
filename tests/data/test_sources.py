"""Inputs at URLs, as patterns and from standard input are those of a directory on this machine."""

import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePath

import datasets
import fsspec
import pytest

import infini_train.data.remote as remote
from data_prep.__main__ import main
from data_prep.input_files import fingerprint_inputs, inputs_to_json, load_inputs
from data_prep.shard import shard_corpus
from data_prep.sources import find_inputs
from tests.helpers.corpora import REPOSITORY, all_bytes, read_with_tarfile, text
from tests.helpers.reading import json_lines, tar, zipped
from tests.helpers.servers import serving

FILES = {
    "en/a.txt": text(1, 30).encode(),
    "en/b.jsonl": json_lines([{"text": text(i, 9)} for i in range(9)]),
    "de/b.jsonl": json_lines([{"text": text(i, 9)} for i in range(20, 29)]),
    "de/c": zipped({"x.txt": text(3, 30).encode()}),
    "de/d.tgz": tar({"x.txt": text(4, 30).encode()}, "w:gz"),
    "empty.jsonl": b"",
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "corpus"


@pytest.fixture
def in_memory(corpus: Path) -> Iterator[str]:
    system = fsspec.filesystem("memory")
    system.put(str(corpus), "/bucket/corpus", recursive=True)
    system.pipe("/bucket/corpus/.hidden/x.txt", b"hidden")
    yield "memory://bucket/corpus"
    system.rm("/bucket", recursive=True)


def test_directory_at_a_url(corpus: Path, in_memory: str, tokenizer_path: Path, tmp_path: Path) -> None:
    shard_corpus([corpus], tmp_path / "here", tokenizer_path)
    shard_corpus([in_memory], tmp_path / "there", tokenizer_path, tasks=3, workers=2)
    read = read_with_tarfile(tmp_path / "here")
    assert read_with_tarfile(tmp_path / "there") == read and len(read) == 21
    files = find_inputs([in_memory], tmp_path / "x")
    (tmp_path / "inputs").write_bytes(inputs_to_json(files))
    assert load_inputs(tmp_path / "inputs") == files
    print_before = fingerprint_inputs(files)
    fsspec.filesystem("memory").pipe("/bucket/corpus/de/c", FILES["de/c"])  # written again: another version
    assert fingerprint_inputs(find_inputs([in_memory], tmp_path / "x")) != print_before


def test_datasets_at_a_url(in_memory: str, tmp_path: Path) -> None:
    """Metadata and formats that are not read are known by the directory, as on this machine."""
    system = fsspec.filesystem("memory")
    datasets.Dataset.from_list([{"text": "saved"}]).save_to_disk(tmp_path / "saved")
    system.put(str(tmp_path / "saved"), "/bucket/more/saved", recursive=True)
    files = find_inputs(["memory://bucket/more"], tmp_path / "x")
    assert {PurePath(file.name).name: file.format.kind for file in files} == {
        "data-00000-of-00001.arrow": "Arrow",
        "dataset_info.json": "metadata",
        "state.json": "metadata",
    }
    indexes = {"mds": {"shards": [{"format": "mds"}]}, "lit": {"chunks": [], "config": {}}, "zarr": {}}
    for name, index in indexes.items():
        known = "zarr.json" if name == "zarr" else "index.json"
        system.pipe({f"/bucket/more/{name}/{known}": json.dumps(index).encode(), f"/bucket/more/{name}/c/0": b"\0"})
    with pytest.raises(ValueError, match=r"(?s)lit: a litdata.*mds: a MosaicML.*zarr: a Zarr.*--accept"):
        find_inputs(["memory://bucket/more"], tmp_path / "x")
    accepted = find_inputs(["memory://bucket/more"], tmp_path / "x", accept=True)
    assert len(accepted) == 6 and sum(file.wrong is not None for file in accepted) == 3


def test_patterns(corpus: Path, in_memory: str, tmp_path: Path) -> None:
    expected = [f"corpus/{name}" for name in ("de/b.jsonl", "en/b.jsonl")]
    for given in (corpus / "*" / "b.jsonl", f"{in_memory}/*/b.jsonl", corpus / "**" / "b*"):
        assert [file.name for file in find_inputs([given], tmp_path / "x")] == expected
    (tmp_path / "a[1]*.txt").write_text("a name is not taken for a pattern")
    assert [file.name for file in find_inputs([tmp_path / "a[1]*.txt"], tmp_path / "x")] == ["a[1]*.txt"]
    for given in (corpus / "*.parquet", f"{in_memory}/*.parquet"):
        with pytest.raises(FileNotFoundError, match=r"parquet matches nothing"):
            find_inputs([given], tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="memory://bucket/gone does not exist"):
        find_inputs(["memory://bucket/gone"], tmp_path / "x")
    with pytest.raises(RuntimeError, match="input klingon://x: ValueError: Protocol not known: klingon"):
        find_inputs(["klingon://x"], tmp_path / "x")


def test_web_server_that_fails(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failed requests are repeated; a server that stays away ends the job, and leaves no document out."""
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.02)
    faults = ("500", "truncated", "short")
    with serving(corpus) as server:
        server.fault = lambda number: None if number % 3 == 2 else faults[number % 2]
        urls = [f"{server.url}/{name}" for name in ("en/b.jsonl", "de/c")]
        shard_corpus(urls, tmp_path / "there", tokenizer_path)
        assert set(server.faults) == {*faults[:2], "none"}
        shard_corpus([corpus / "en/b.jsonl", corpus / "de/c"], tmp_path / "here", tokenizer_path)
        assert read_with_tarfile(tmp_path / "there") == read_with_tarfile(tmp_path / "here")
        files = find_inputs(urls[:1], tmp_path / "x")  # with patience, because the server still fails
        monkeypatch.setattr(remote, "PATIENCE", 0.1)
        server.fault = lambda number: "500"
        with pytest.raises(RuntimeError, match=r"en/b\.jsonl, bytes from 0: .*given up after"):
            files[0].open()


def test_standard_input(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run with the same content does nothing, with another one it refuses; the copy is removed."""

    def run(content: bytes, *words: object) -> int:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        return main([*map(str, words), "-"])

    words = ("shard", "--tokenizer", tokenizer_path, "--out", tmp_path / "out")
    assert run(FILES["en/b.jsonl"], *words) == 0
    made = all_bytes(tmp_path / "out")
    assert [about["id"] for about, _ in read_with_tarfile(tmp_path / "out")] == [f"stdin:{i + 1}" for i in range(9)]
    assert run(FILES["en/b.jsonl"], *words) == 0 and "nothing to do" in capsys.readouterr().out
    assert run(FILES["de/b.jsonl"], *words) == 2 and "other options (inputs)" in capsys.readouterr().err
    assert all_bytes(tmp_path / "out") == made
    assert (
        run(json.dumps({"text": text(0, 900)}).encode(), "tokenizer", "--out", tmp_path / "t", "--vocab_size", 280)
        == 0
    )
    assert not list(tmp_path.glob(".*"))
    assert run(b"", *words, "--executor", "slurm", "--cluster", REPOSITORY / "configs/slurm/cpu.yaml") == 2
    assert "standard input" in capsys.readouterr().err
