"""`prep import-tokens` gives the documents of every format. Where said, the format's own library wrote the files."""

import csv
import gzip
import json
import shutil
import struct
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from datatrove.data import Document
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

from data_prep.__main__ import main
from data_prep.import_tokens import import_tokens
from data_prep.token_files import find_token_files
from data_prep.token_rows import Reading, read_rows
from data_prep.validate import validate_dataset
from infini_train.tokenizer.loading import load_tokenizer
from tests.helpers.corpora import all_bytes, read_with_tarfile, text

BOS, EOS = 1, 2  # of the trained tokenizer
TEXTS = [text(seed, 30 + 17 * seed) for seed in range(7)]
MDS = Path(__file__).parent / "made_by_mosaicml_streaming"  # by mosaicml-streaming 0.13.0, see its README
MDS_TEXTS = ["the first document", "second", "the third one, which is the longest of all", "4"]


@pytest.fixture(scope="module")
def documents(tokenizer_path: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(tokenizer_path)
    return [tokenizer.encode(content)[1:-1].tolist() for content in TEXTS]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer.json as datatrove loads it, with an EOS that is BOS, too."""
    directory = tmp_path_factory.mktemp("hugging_face")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return directory


def imported(out: Path) -> list[list[int]]:
    assert validate_dataset(out) == []
    return [tokens for _, tokens in read_with_tarfile(out)]


def expected(documents: list[list[int]], bos: int = BOS, eos: int = EOS) -> list[list[int]]:
    return [[bos, *ids, eos] for ids in documents]


def llm_c(path: Path, ids: list[int], magic: int = 20240520) -> None:
    """A file as llm.c's dev/data/data_common.py lays it out."""
    header = struct.pack("<256i", magic, 1, len(ids), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(ids)}{'H' if magic == 20240520 else 'I'}", *ids))


def with_eos(documents: list[list[int]]) -> list[int]:
    return [token for ids in documents for token in [*ids, EOS]]


def nano_gpt(root: Path, documents: list[list[int]]) -> None:
    np.array(with_eos(documents), np.uint16).tofile(root / "train.bin")


def llm_c_gpt2(root: Path, documents: list[list[int]]) -> None:
    """EOS before each document, and documents that go on in the next file."""
    ids = [token for document in documents for token in [EOS, *document]]
    for number, start in enumerate(range(0, len(ids), 300)):
        llm_c(root / f"train_{number:06d}.bin", ids[start : start + 300])


def llm_c_llama3(root: Path, documents: list[list[int]]) -> None:
    llm_c(root / "train.bin", with_eos(documents), magic=20240801)


def dolma(root: Path, documents: list[list[int]], dtype: str = "<u2") -> None:
    """As Dolma's memmap_writer.py lays it out."""
    np.array(with_eos(documents), dtype).tofile(root / "part-0-00000.npy")
    start = 0
    with gzip.open(root / "part-0-00000.csv.gz", "wt", newline="") as f:
        rows = csv.writer(f)
        for number, ids in enumerate(documents):
            rows.writerow([start, start + len(ids) + 1, f"id{number}", "a.json.gz", number + 1])
            start += len(ids) + 1


def dolma_without_index(root: Path, documents: list[list[int]]) -> None:
    dolma(root, documents, "<u4")
    (root / "part-0-00000.csv.gz").unlink()


def olmo(root: Path, documents: list[list[int]]) -> None:
    np.save(root / "a.npy", np.array(with_eos(documents[:3]), np.uint32))
    np.save(root / "b.npy", np.array(with_eos(documents[3:]), np.int64))


def parquet(root: Path, documents: list[list[int]]) -> None:
    with_bos = [[BOS, *ids] for ids in documents]
    pq.write_table(
        pa.table({"id": range(len(documents)), "input_ids": with_bos}), root / "a.parquet", row_group_size=3
    )


def megatron_in_sequences(root: Path, documents: list[list[int]]) -> None:
    """As Megatron's IndexedDatasetBuilder lays out documents of several sequences each, with int32."""
    sequences = [part for ids in documents for part in (ids[:9], [*ids[9:], EOS])]
    ids = np.concatenate(sequences).astype("<i4")
    ids.tofile(root / "a_text_document.bin")
    lengths = np.array(list(map(len, sequences)), "<i4")
    offsets = 4 * (np.cumsum(lengths, dtype="<i8") - lengths)
    borders = np.arange(0, len(sequences) + 1, 2, "<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(sequences), len(borders))
    (root / "a_text_document.idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + borders.tobytes())


WRITERS: list[Callable[[Path, list[list[int]]], None]] = [
    nano_gpt,
    llm_c_gpt2,
    llm_c_llama3,
    dolma,
    dolma_without_index,
    olmo,
    parquet,
    megatron_in_sequences,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_formats(
    tmp_path: Path,
    tokenizer_path: Path,
    documents: list[list[int]],
    write: Callable[[Path, list[list[int]]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", documents)
    (tmp_path / "in" / "README.md").write_text("what this is")
    import_tokens([tmp_path / "in"], tmp_path / "out", tokenizer_path)
    assert imported(tmp_path / "out") == expected(documents)
    told = capsys.readouterr().out
    assert repr(TEXTS[0][:200]) in told and "gives 100.0% of" in told
    assert "not read, because they hold no ids: 1 files (in/README.md)" in told
    assert f"7 documents, {sum(map(len, documents)):,} tokens" in told


@pytest.mark.parametrize("step", [DocumentTokenizer, MegatronDocumentTokenizer])
def test_datatrove(tmp_path: Path, hugging_face: Path, step: type) -> None:
    options = {"shuffle_documents": False} if step is DocumentTokenizer else {}
    written = step(
        str(tmp_path / "in"),
        tokenizer_name_or_path=str(hugging_face / "tokenizer.json"),
        eos_token="<|endoftext|>",
        **options,
    )
    for rank in range(2):
        written.run(iter([Document(t, str(n)) for n, t in enumerate(TEXTS)][rank::2]), rank=rank, world_size=2)
    import_tokens([tmp_path / "in"], tmp_path / "out", hugging_face)
    tokenizer = load_tokenizer(hugging_face)
    assert imported(tmp_path / "out") == [tokenizer.encode(t).tolist() for t in TEXTS[::2] + TEXTS[1::2]]


@pytest.mark.parametrize(("name", "whole"), [("rows", True), ("compressed", True), ("packed", False)])
def test_mds(tmp_path: Path, tokenizer_path: Path, name: str, whole: bool) -> None:
    import_tokens([MDS / name], tmp_path / "out", tokenizer_path, accept=True)
    ids = [[3 + byte for byte in content.encode()] for content in MDS_TEXTS]
    if not whole:  # rows of 38 tokens cut the third document, which the `indices` of both rows have a part of
        stream = [token for document in expected(ids) for token in document]
        ids = [*ids[:2], stream[29:38], stream[38:72][:-1], ids[3]]
    assert imported(tmp_path / "out") == expected(ids)


def test_packed_rows_are_cut_at_eos(tmp_path: Path, tokenizer_path: Path, documents: list[list[int]]) -> None:
    """Rows of a fixed length, which documents cross, as llm-foundry's ConcatTokensDataset makes them."""
    stream = with_eos(documents)
    rows = [stream[start : start + 64] for start in range(0, len(stream), 64)]
    pq.write_table(pa.table({"tokens": pa.array(rows, pa.list_(pa.int32()))}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a.parquet, row \d, token \d+: found EOS \(2\) inside a document.*--borders"
    ):
        import_tokens([tmp_path / "a.parquet"], tmp_path / "out", tokenizer_path)
    assert not (tmp_path / "out").exists()
    import_tokens([tmp_path / "a.parquet"], tmp_path / "out", tokenizer_path, borders="eos")
    assert imported(tmp_path / "out") == expected(documents)


def test_rows_that_keep_eos_inside(
    tmp_path: Path, tokenizer_path: Path, documents: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    joined = [documents[0] + [EOS, BOS] + documents[1], documents[2]]
    pq.write_table(pa.table({"input_ids": joined}), tmp_path / "a.parquet")
    import_tokens([tmp_path / "a.parquet"], tmp_path / "out", tokenizer_path, borders="index")
    assert imported(tmp_path / "out") == expected(joined)
    assert "BOS or EOS inside of documents, kept: 2" in capsys.readouterr().out


def test_another_id_between_documents(tmp_path: Path, tokenizer_path: Path, documents: list[list[int]]) -> None:
    stream = [token for ids in documents for token in [BOS, *ids]]
    np.array(stream, np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a.bin: found no EOS \(2\).*--eos_id names another id"):
        import_tokens([tmp_path / "a.bin"], tmp_path / "out", tokenizer_path)
    import_tokens([tmp_path / "a.bin"], tmp_path / "out", tokenizer_path, eos_id=BOS)
    assert imported(tmp_path / "out") == expected(documents)


def test_split_and_second_run(
    tmp_path: Path, tokenizer_path: Path, documents: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    nano_gpt(tmp_path, documents)
    command = ["import-tokens", str(tmp_path / "*.bin"), "--tokenizer", str(tokenizer_path), "--out"]
    split = ["--validation-fraction", "0.3", "--test_fraction", "0.2"]
    assert main([*command, str(tmp_path / "out"), *split]) == 0
    parts = {part: imported(tmp_path / "out" / part) for part in ("train", "valid", "test")}
    assert sorted(chain.from_iterable(parts.values())) == sorted(expected(documents)) and all(parts.values())
    before = all_bytes(tmp_path / "out")
    assert main([*command, str(tmp_path / "out"), *split]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "again"), *split]) == 0
    assert all_bytes(tmp_path / "again") == before
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "was made with other options" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out"), "--overwrite"]) == 0
    assert imported(tmp_path / "out") == expected(documents)


def test_documents_without_tokens_are_counted(
    tmp_path: Path, tokenizer_path: Path, documents: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"input_ids": [[], [BOS, EOS], documents[0], [EOS]]}), tmp_path / "a.parquet")
    import_tokens([tmp_path / "a.parquet"], tmp_path / "out", tokenizer_path)
    assert imported(tmp_path / "out") == expected(documents[:1])
    assert "left out: 3 documents without tokens" in capsys.readouterr().out


def test_another_tokenizer(tmp_path: Path, tokenizer_path: Path, documents: list[list[int]]) -> None:
    """Ids that are all in the vocabulary, but stand for other texts."""
    shifted = [[3 + (token * 5) % 287 for token in ids] for ids in documents]
    nano_gpt(tmp_path, shifted)
    with pytest.raises(ValueError, match=r"(?s)train.bin:1 begins '.*gives \d+\.\d% of .*--accept continues"):
        import_tokens([tmp_path / "train.bin"], tmp_path / "out", tokenizer_path)
    import_tokens([tmp_path / "train.bin"], tmp_path / "out", tokenizer_path, accept=True)
    assert imported(tmp_path / "out") == expected(shifted)


def test_ids_outside_the_vocabulary(tmp_path: Path, tokenizer_path: Path, documents: list[list[int]]) -> None:
    """Far behind the samples, in a file with a header: the offset is that in the file."""
    ids = with_eos(documents)
    ids[-3] = 290
    llm_c(tmp_path / "a.bin", ids)
    byte = 1024 + 2 * (len(ids) - 3)
    message = rf"a.bin, token {len(ids) - 3:,} \(byte {byte:,}\): found id 290, expected one of the 290 of"
    with pytest.raises(ValueError, match=message):
        import_tokens([tmp_path / "a.bin"], tmp_path / "out", tokenizer_path)
    assert list(tmp_path.glob(".out*")) == [] and not (tmp_path / "out").exists()
    assert (tmp_path / "a.bin").read_bytes()[byte : byte + 2] == struct.pack("<H", 290)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def without_index(root: Path) -> None:
    (root / "a_text_document.idx").write_bytes(b"other")


def null_rows(root: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[3, 4, None]]}), root / "a.parquet")


def floats(root: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[3.0]], "text": ["a"]}), root / "a.parquet")


def other_columns(root: Path) -> None:
    pq.write_table(pa.table({"ids": [[3]], "text": ["a"]}), root / "a.parquet")


def equal_columns(root: Path) -> None:
    column = pa.array([[3, 4]])
    pq.write_table(pa.table([column, column], names=["input_ids", "input_ids"]), root / "a.parquet")


def damaged_csv(root: Path) -> None:
    path = root / "part-0-00000.csv.gz"
    content = bytearray(path.read_bytes())
    content[-8 - len(content) // 4 :] = b"\xff" * (8 + len(content) // 4)
    path.write_bytes(content)


def npy_header(path: Path) -> None:
    """An array whose header, which numpy parses as Python, has lost the brace that ends it."""
    np.save(path, np.arange(20, dtype=np.uint16))
    path.write_bytes(path.read_bytes().replace(b"}", b" ", 1))


BROKEN: dict[str, tuple[Callable[[Path, list[list[int]]], None], Callable[[Path], None], str]] = {
    "odd": (
        nano_gpt,
        lambda root: cut(root / "train.bin", 101),
        r"train.bin: found 101 bytes of ids, expected a mult",
    ),
    "empty": (nano_gpt, lambda root: cut(root / "train.bin", 0), "train.bin: found no ids, an empty file"),
    "header": (
        llm_c_llama3,
        lambda root: cut(root / "train.bin", 1000),
        "found a header of 1000 bytes, expected 1,024",
    ),
    "cut": (llm_c_llama3, lambda root: cut(root / "train.bin", 1424), "found 100 tokens, its header says"),
    "no index": (
        megatron_in_sequences,
        without_index,
        "found no Megatron index, expected one that begins with MMIDI",
    ),
    "index": (
        megatron_in_sequences,
        lambda root: cut(root / "a_text_document.idx", 90),
        "a_text_document.idx: found 90 bytes, expected 266",
    ),
    "tokens": (
        megatron_in_sequences,
        lambda root: cut(root / "a_text_document.bin", 400),
        "a_text_document.bin: found 100 tokens, its index says",
    ),
    "ends": (
        dolma,
        lambda root: cut(root / "part-0-00000.npy", 400),
        r"0.csv.gz: its documents end at token [\d,]+, expected ends that ascend to the 200 tokens \(uint16\) of",
    ),
    "array": (
        olmo,
        lambda root: np.save(root / "a.npy", np.zeros((2, 3), int)),
        r"a.npy: found an array .2, 3. of int64, expected one row",
    ),
    "null": (parquet, null_rows, "a.parquet, row 1: found null, expected ids"),
    "floats": (parquet, floats, "column input_ids has the type list<.*double>, expected lists of integers"),
    "columns": (
        parquet,
        other_columns,
        "found columns ids, text, expected input_ids or tokens: --tokens_field names",
    ),
    "csv": (dolma, damaged_csv, "0.csv.gz: expected rows of start, end, id, src, loc: "),
    "npy header": (olmo, lambda root: npy_header(root / "a.npy"), "a.npy: "),
    "two columns": (parquet, equal_columns, "a.parquet: found 2 columns input_ids, expected one"),
    "damaged": (parquet, lambda root: cut(root / "a.parquet", 300), "a.parquet: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path: Path, tokenizer_path: Path, documents: list[list[int]], case: str) -> None:
    write, damage, message = BROKEN[case]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", documents)
    damage(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        import_tokens([tmp_path / "in"], tmp_path / "out", tokenizer_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["rows", "compressed", "packed"])
def test_damaged_mds(tmp_path: Path, tokenizer_path: Path, name: str) -> None:
    for file in (MDS / name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = min(tmp_path.glob("shard*"))
    cut(shard, 100)
    with pytest.raises(ValueError, match=rf"{shard.name}: (found 100 bytes, its index.json says|.*)"):
        import_tokens([tmp_path], tmp_path.with_name("out"), tokenizer_path, accept=True)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="the dataset has lost a shard"):
        import_tokens([tmp_path], tmp_path.with_name("out"), tokenizer_path, accept=True)


@pytest.mark.parametrize(
    ("inputs", "more", "message"),
    [
        (["TMP/none.bin"], [], "none.bin does not exist"),
        (["TMP/*.ds"], [], "matches nothing"),
        (["TMP/a.txt"], [], "a.txt: found no file of ids that is read, expected .bin (of Megatron"),
        (["TMP/texts"], [], "no files of token ids in"),
        (["s3://bucket/a.bin"], [], "expected files on this machine: copy them here first"),
        (["TMP/train.bin", "TMP/train.bin"], [], "2 times, expected it once"),
        (["TMP/train.bin"], ["--eos_id", "290"], "eos_id: found 290, expected an id from 0 to 289"),
        (["TMP/train.bin"], ["--borders", "index"], "does not say where documents end"),
        (["TMP/train.bin"], ["--dtype", "int64"], "train.bin"),
        (["TMP"], [], "lies in the input"),
    ],
)
def test_bad_options(
    tmp_path: Path,
    tokenizer_path: Path,
    documents: list[list[int]],
    capsys: pytest.CaptureFixture[str],
    inputs: list[str],
    more: list[str],
    message: str,
) -> None:
    nano_gpt(tmp_path, documents)
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "texts/a.txt"):
        (tmp_path / name).write_text("a text")
    words = [word.replace("TMP", str(tmp_path)) for word in inputs]
    out = str(tmp_path / "out")
    assert main(["import-tokens", *words, "--tokenizer", str(tokenizer_path), "--out", out, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_size_of_ids_is_guessed(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for vocab_size in (300, 50_257, 128_256):
        for dtype in ("<u2", "<u4"):
            ids = draw.integers(0, min(vocab_size, 65_536), 4096).astype(dtype)
            ids.tofile(tmp_path / "a.bin")
            (file,), _ = find_token_files([tmp_path / "a.bin"], tmp_path / "out")
            (row,) = read_rows(file, Reading(vocab_size))
            assert row.ids.dtype == dtype and np.array_equal(row.ids, ids)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("column_names", value) for value in (None, 5, ["a"])),
        *(("column_encodings", value) for value in (None, [5])),
        *(("column_sizes", value) for value in (None, ["4"])),
        *(("raw_data", value) for value in (None, 5, {}, {"basename": 5, "bytes": 1})),
    ],
)
def test_index_of_mds_that_is_damaged(tmp_path: Path, tokenizer_path: Path, field: str, value: object) -> None:
    source = Path(__file__).parent / "made_by_mosaicml_streaming" / "rows"
    shutil.copytree(source, tmp_path / "in")
    path = tmp_path / "in" / "index.json"
    index = json.loads(path.read_bytes())
    index["shards"][0][field] = value
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json, shard 0: expected names, encodings and sizes"):
        import_tokens([tmp_path / "in"], tmp_path / "out", tokenizer_path)


def test_shard_of_mds_with_too_many_rows(tmp_path: Path, tokenizer_path: Path) -> None:
    shutil.copytree(Path(__file__).parent / "made_by_mosaicml_streaming" / "rows", tmp_path / "in")
    path = tmp_path / "in" / "shard.00000.mds"
    path.write_bytes(b"\xff\xff\xff\x7f" + path.read_bytes()[4:])
    with pytest.raises(ValueError, match=r"too few for the offsets of 2,147,483,647 rows"):
        import_tokens([tmp_path / "in"], tmp_path / "out", tokenizer_path)
