"""What a dataset contains: duplicates, joined documents, appended documents, and a corpus with many broken files."""

import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import data_prep.documents as documents
from data_prep.shard import append_corpus, shard_corpus
from data_prep.validate import validate_dataset
from infini_train.data.index import DatasetIndex
from tests.helpers.corpora import all_bytes, read_with_tarfile, text, trained_tokenizer
from tests.helpers.reading import tar, zipped

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def files(root: Path, texts: dict[str, str | bytes]) -> Path:
    for name, content in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def texts_of(dataset: Path, tokenizer: Path) -> dict[str, str]:
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    found = {about["id"]: peer.decode(tokens[1:-1]) for about, tokens in read_with_tarfile(dataset)}
    assert all(tokens[0] == BOS and tokens[-1] == EOS for _, tokens in read_with_tarfile(dataset))
    return found


def rejects(path: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["id"]: line["reason"] for line in lines}


def test_duplicates_over_files_formats_and_tasks(tokenizer: Path, tmp_path: Path) -> None:
    record = json.dumps({"text": text(1, 50), "id": "same"})
    other = json.dumps({"text": text(2, 50), "id": "same"})
    corpus = files(
        tmp_path / "in",
        {
            "a.txt": text(1, 50),
            "b.jsonl": f"{record}\n{other}\n{other}\n",
            "c/d.txt": text(2, 50).replace("\n", "\r\n"),
        },
    )
    for tasks in (1, 3):
        out = tmp_path / f"out{tasks}"
        shard_corpus([corpus], out, tokenizer, tasks=tasks)
        assert texts_of(out, tokenizer) == {"in/a.txt": text(1, 50), "same": text(2, 50)}
        lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
        assert [(line["id"], line["reason"]) for line in lines] == [
            ("same", "duplicate"),
            ("same", "duplicate"),
            ("in/c/d.txt", "duplicate"),
        ]
    (corpus / "b.jsonl").write_text(f"{other}\n" + json.dumps({"text": text(3, 50), "id": "same"}))
    with pytest.raises(ValueError, match="1 of 3 documents have the id of an earlier one with another text"):
        shard_corpus([corpus], tmp_path / "ids", tokenizer)
    shard_corpus([corpus], tmp_path / "ids", tokenizer, accept=True)
    assert rejects(tmp_path / "ids" / "rejects.jsonl") == {"same": "duplicate_id", "in/c/d.txt": "duplicate"}


def test_sources_with_the_same_names_and_numbers(tokenizer: Path, tmp_path: Path) -> None:
    """Two directories with the same name, and records that each file numbers from 0: nothing is lost silently."""
    for number, parent in enumerate("ab"):
        for file in range(3):
            files(tmp_path / parent / "en", {f"{file}.txt": text(10 * number + file, 50)})
    inputs = [tmp_path / "a" / "en", tmp_path / "b" / "en"]
    shard_corpus(inputs, tmp_path / "out", tokenizer)
    expected = {f"en/{file}.txt": text(file, 50) for file in range(3)}
    expected |= {f"2:en/{file}.txt": text(10 + file, 50) for file in range(3)}
    assert texts_of(tmp_path / "out", tokenizer) == expected
    shard_corpus([*inputs, inputs[0]], tmp_path / "again", tokenizer)  # the same files are duplicates, as they were
    assert texts_of(tmp_path / "again", tokenizer) == expected
    numbered = {
        f"{name}.jsonl": "".join(json.dumps({"text": text(at + i, 50), "id": i}) + "\n" for i in range(3))
        for name, at in (("a", 0), ("b", 10))
    }
    records = files(tmp_path / "records", numbered)
    with pytest.raises(ValueError, match=r"3 of 6 documents have the id of an earlier one .* --id_field"):
        shard_corpus([records], tmp_path / "numbered", tokenizer)
    shard_corpus([records], tmp_path / "numbered", tokenizer, id_field="", overwrite=True)
    assert set(texts_of(tmp_path / "numbered", tokenizer)) == {
        f"records/{name}.jsonl:{line}" for name in "ab" for line in (1, 2, 3)
    }


def test_an_empty_id_field_is_no_field(tokenizer: Path, tmp_path: Path) -> None:
    """pandas gives the column of row numbers an empty name; with such ids, the second file would be left out."""
    numbered = {f"{name}.csv": f",text\n0,{name} one\n1,{name} two\n" for name in "ab"}
    shard_corpus([files(tmp_path / "in", numbered)], tmp_path / "out", tokenizer, id_field="")
    assert set(texts_of(tmp_path / "out", tokenizer)) == {f"in/{name}.csv:{row}" for name in "ab" for row in (1, 2)}


def test_share_of_ids_that_an_earlier_document_has(tokenizer: Path, tmp_path: Path) -> None:
    """It is that of the documents of the inputs, however many of them are joined or too short."""
    records = [{"text": text(i, 50), "id": min(i, 9), "group": "g"} for i in range(11)] + [{"text": "a", "id": 10}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    shard_corpus([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer, join="group", min_tokens=20)
    assert Counter(rejects(tmp_path / "out" / "rejects.jsonl").values()) == {"duplicate_id": 1, "too_short": 1}
    assert set(texts_of(tmp_path / "out", tokenizer)) == {"g"}


def test_appended_files_with_the_names_of_others(tokenizer: Path, tmp_path: Path) -> None:
    """What helps is named: `append` has no --id_field, and texts have no field."""
    shard_corpus([files(tmp_path / "in", {"a.txt": text(1, 50)})], tmp_path / "out", tokenizer)
    files(tmp_path / "in", {"a.txt": text(2, 50), "b.txt": text(3, 50)})
    with pytest.raises(ValueError, match=r"1 of 2 documents .* \(the first is in/a.txt\).* give inputs other names"):
        append_corpus([tmp_path / "in"], tmp_path / "out")
    (tmp_path / "in").rename(tmp_path / "other")
    append_corpus([tmp_path / "other"], tmp_path / "out", overwrite=True)
    assert set(texts_of(tmp_path / "out", tokenizer)) == {"in/a.txt", "other/a.txt", "other/b.txt"}


def test_characters_and_line_ends(tokenizer: Path, tmp_path: Path) -> None:
    corpus = files(tmp_path / "in", {"a.txt": "Zu\u0308rich\r\nﬁn\rend"})
    for form, expected in (
        ("NFC", "Zürich\nﬁn\nend"),
        ("NFKC", "Zürich\nfin\nend"),
        ("none", "Zu\u0308rich\nﬁn\nend"),
    ):
        shard_corpus([corpus], tmp_path / form, tokenizer, unicode_form=form)  # type: ignore[arg-type]
        assert texts_of(tmp_path / form, tokenizer) == {"in/a.txt": expected}


@pytest.mark.parametrize("tasks", [1, 4])
def test_joined_by_directory_by_tree_and_by_field(tokenizer: Path, tmp_path: Path, tasks: int) -> None:
    names = ("a/x/1.c", "a/x/2.c", "a/y/z/3.c", "b/4.c", "5.c")
    corpus = files(tmp_path / "src", {name: text(i, 20) for i, name in enumerate(names)})
    told = {name: text(i, 20) for i, name in enumerate(names)}

    def joined(*members: str) -> str:
        return "\n\n".join(told[name] for name in members)

    shard_corpus([corpus], tmp_path / "own", tokenizer, join="directory", tasks=tasks)
    assert texts_of(tmp_path / "own", tokenizer) == {
        "src": told["5.c"],
        "src/a/x": joined("a/x/1.c", "a/x/2.c"),
        "src/a/y/z": told["a/y/z/3.c"],
        "src/b": told["b/4.c"],
    }
    shard_corpus([corpus], tmp_path / "tree", tokenizer, join="directory:1", tasks=tasks)
    trees = {"src": told["5.c"], "src/a": joined("a/x/1.c", "a/x/2.c", "a/y/z/3.c"), "src/b": told["b/4.c"]}
    assert texts_of(tmp_path / "tree", tokenizer) == trees
    assert validate_dataset(tmp_path / "tree") == []
    lines = [json.dumps({"text": told[n], "id": n, "repo": n.split("/")[0] if "/" in n else None}) for n in names]
    records = files(tmp_path / "records", {"r.jsonl": "\n".join(lines)})
    least = DatasetIndex.load(tmp_path / "tree").tokens_D.max()
    shard_corpus([records], tmp_path / "field", tokenizer, join="repo", min_tokens=int(least), tasks=tasks)
    assert texts_of(tmp_path / "field", tokenizer) == {"a": trees["src/a"]}
    assert rejects(tmp_path / "field" / "rejects.jsonl") == {"b": "too_short", "5.c": "too_short"}


HEADING = "# file: {path}"


@pytest.mark.parametrize("tasks", [1, 3])
def test_joined_members_of_archives(tokenizer: Path, tmp_path: Path, tasks: int) -> None:
    """An archive is a directory of its members, so that a source tree is joined as if it were unpacked."""
    tree = {f"linux-6/{name}": text(i, 20) for i, name in enumerate(("fs/a.c", "fs/x/b.c", "net/c.c", "README"))}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar.xz").write_bytes(tar({f"./{name}": t.encode() for name, t in tree.items()}, "w:xz"))
    inner = {"b.tar": tar({"d/e.c": text(9, 20).encode(), "d/f.c": text(10, 20).encode()})}
    (tmp_path / "in" / "b.zip").write_bytes(zipped(inner))
    members = list(tree.values())

    def joined(heading: str | None, join: str) -> dict[str, str]:
        shard_corpus(
            [tmp_path / "in"], tmp_path / "out", tokenizer, join=join, heading=heading, tasks=tasks, overwrite=True
        )
        return texts_of(tmp_path / "out", tokenizer)

    assert joined(None, "directory:3") == {
        "in/a.tar.xz/linux-6/fs": f"{members[0]}\n\n{members[1]}",
        "in/a.tar.xz/linux-6/net": members[2],
        "in/a.tar.xz/linux-6": members[3],
        "in/b.zip/b.tar/d": f"{text(9, 20)}\n\n{text(10, 20)}",
    }
    assert joined(HEADING, "directory:3") == {
        "in/a.tar.xz/linux-6/fs": f"# file: a.c\n{members[0]}\n\n# file: x/b.c\n{members[1]}",
        "in/a.tar.xz/linux-6/net": f"# file: c.c\n{members[2]}",
        "in/a.tar.xz/linux-6": f"# file: README\n{members[3]}",
        "in/b.zip/b.tar/d": f"# file: e.c\n{text(9, 20)}\n\n# file: f.c\n{text(10, 20)}",
    }
    assert joined(HEADING, "directory:2")["in/a.tar.xz/linux-6"] == "\n\n".join(
        f"# file: {name.removeprefix('linux-6/')}\n{content}" for name, content in tree.items()
    )
    assert set(joined(None, "directory")) == {
        *(f"in/a.tar.xz/linux-6{below}" for below in ("", "/fs", "/fs/x", "/net")),
        "in/b.zip/b.tar/d",
    }


def test_headings_of_files_and_records(tokenizer: Path, tmp_path: Path) -> None:
    """By path, by a field, and in lists of objects; a heading makes no duplicate another text."""
    texts = [text(i, 20) for i in range(4)]
    names = ("r/a.c", "r/b/c.c", "s/d.c")
    corpus = files(tmp_path / "in", {name: texts[i] for i, name in enumerate(names)} | {"s/e.c": texts[0]})
    shard_corpus([corpus], tmp_path / "files", tokenizer, join="directory:1", heading="/* {path} */ {{")
    expected = {
        "in/r": f"/* a.c */ {{\n{texts[0]}\n\n/* b/c.c */ {{\n{texts[1]}",
        "in/s": f"/* d.c */ {{\n{texts[2]}",
    }
    assert texts_of(tmp_path / "files", tokenizer) == expected
    assert rejects(tmp_path / "files" / "rejects.jsonl") == {"in/s/e.c": "duplicate"}
    assert validate_dataset(tmp_path / "files") == []

    records = [
        {"text": texts[0], "id": "0", "repo": "r", "file": {"path": "Zu\u0308.c", "n": 1}},
        {"text": texts[1], "id": "1", "repo": "r", "file": {"path": "b.c", "n": 2}},
        {"text": texts[2], "id": "2", "repo": "r", "file": {"n": 3}},
        {"text": texts[3], "id": "3", "repo": "r", "file": {"path": "a\0", "n": 4}},
        {"text": text(5, 20), "id": "4"},
    ]
    lines = files(tmp_path / "lines", {"a.jsonl": "\n".join(map(json.dumps, records))})
    shard_corpus([lines], tmp_path / "records", tokenizer, join="repo", heading="{file.path}:{file.n}")
    assert texts_of(tmp_path / "records", tokenizer) == {
        "r": f"Zü.c:1\n{texts[0]}\n\nb.c:2\n{texts[1]}",
        "4": text(5, 20),
    }
    told = [json.loads(line) for line in (tmp_path / "records" / "rejects.jsonl").read_text().splitlines()]
    assert [(one["id"], one["reason"]) for one in told] == [("2", "no_text_field"), ("3", "nul_bytes")]
    assert told[0]["detail"] == "expected 'path', found n"

    stack = [{"files": [{"path": f"{i}.c", "content": texts[i]} for i in (0, 1)]}, {"files": [{"content": "x"}]}]
    lists = files(tmp_path / "lists", {"a.jsonl": "\n".join(map(json.dumps, stack))})
    shard_corpus([lists], tmp_path / "listed", tokenizer, text_field="files[].content", heading=HEADING)
    listed = f"# file: 0.c\n{texts[0]}\n\n# file: 1.c\n{texts[1]}"
    assert texts_of(tmp_path / "listed", tokenizer) == {"lists/a.jsonl:1": listed}
    assert rejects(tmp_path / "listed" / "rejects.jsonl") == {"lists/a.jsonl:2": "no_text_field"}

    more = files(tmp_path / "more", {"t/f.c": texts[3]})
    append_corpus([more], tmp_path / "files")
    assert texts_of(tmp_path / "files", tokenizer) == expected | {"more/t": f"/* f.c */ {{\n{texts[3]}"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heading": HEADING}, "heading: found text_field text without --join, expected --join, or one list"),
        ({"heading": HEADING, "text_field": "a[].b[].c"}, "or one list of objects, such as files"),
        ({"heading": "# file", "join": "directory"}, "heading: found '# file', expected a field in braces"),
        ({"heading": "{path", "join": "directory"}, "heading: found '{path': expected '}' before end of string"),
        ({"heading": "{}", "join": "directory"}, "heading: found '', expected a field, or a path"),
        ({"heading": "{path!r}", "join": "directory"}, "expected a field in braces"),
        (
            {"heading": "{pth}", "join": "directory"},
            "no_text_field: in/a.txt: expected 'pth', found path, the heading",
        ),
    ],
)
def test_bad_headings(tokenizer: Path, tmp_path: Path, options: dict[str, str], message: str) -> None:
    corpus = files(tmp_path / "in", {"a.txt": text(1, 20)})
    with pytest.raises(ValueError, match=re.escape(message)):
        shard_corpus([corpus], tmp_path / "out", tokenizer, **options)  # type: ignore[arg-type]


def test_webdataset_of_texts(tokenizer: Path, tmp_path: Path) -> None:
    """The text is KEY.txt or a field of KEY.json; member names such as `../x` are only names, never paths."""
    members = {
        "1.json": b'{"stars": 5}',
        "1.txt": text(1, 30).encode(),
        "2.json": json.dumps({"text": text(2, 30), "id": "two"}).encode(),
        "../../3.txt": text(3, 30).encode(),
        "4.jpg": b"picture",
        "5.json": b'{"stars": 4}',
        "6.txt": b"\xff",
    }
    (tmp_path / "in").mkdir()
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / "in" / name, mode) as tar:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, BytesIO(content if name == "a.tar" else content.replace(b"mem", b"MEM")))
    os.truncate(tmp_path / "in" / "b.tar.gz", (tmp_path / "in" / "b.tar.gz").stat().st_size - 40)
    shard_corpus([tmp_path / "in"], tmp_path / "out", tokenizer, tasks=2)
    found = texts_of(tmp_path / "out", tokenizer)
    expected = {"in/a.tar:1": text(1, 30), "two": text(2, 30), "in/a.tar:../../3": text(3, 30)}
    assert {name: found[name] for name in expected} == expected
    found = rejects(tmp_path / "out" / "rejects.jsonl")
    assert found["in/a.tar:5"] == "no_text_field" and found["in/a.tar:6"] == "not_utf8"
    assert found["in/b.tar.gz"] == "unreadable"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_append(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Appending changes neither existing shards nor the split; the split is that of an independent hash."""
    first = files(tmp_path / "first", {f"{i}.txt": text(i, 60) for i in range(30)})
    more = files(tmp_path / "more", {f"{i}.txt": text(i, 60) for i in range(25, 50)})  # 25 to 29 are in `first` too
    last = files(tmp_path / "last", {f"{i}.txt": text(i, 60) for i in range(48, 55)})
    out = tmp_path / "out"
    shard_corpus([first], out, tokenizer, validation_fraction=0.3, shard_tokens=1500)
    tokenizer_path = out / "train" / "tokenizer.model"
    assert tokenizer_path.exists()
    steps = [{name: sha for name, sha in all_bytes(out).items() if name.endswith((".tar", "rejects.jsonl"))}]
    old = {part: read_with_tarfile(out / part) for part in ("train", "valid")}
    for number, corpus in enumerate((more, last), start=1):
        for _ in range(2):
            append_corpus([corpus], out, tasks=3, workers=2)
        assert "has these documents already: nothing to do" in capsys.readouterr().out
        assert set(rejects(out / f"rejects-{number}.jsonl").values()) == {"duplicate"}
        steps.append({name: sha for name, sha in all_bytes(out).items() if name.endswith((".tar", ".jsonl"))})
        assert steps[-2].items() <= steps[-1].items()
    assert len(rejects(out / "rejects-1.jsonl")) == 5 and len(rejects(out / "rejects-2.jsonl")) == 2
    ids = {}
    for part in ("train", "valid"):
        found = read_with_tarfile(out / part)
        assert found[: len(old[part])] == old[part]
        ids[part] = {about["id"] for about, _ in found}
        assert validate_dataset(out / part) == []
        index = DatasetIndex.load(out / part)
        assert index.options["appended"][0]["documents"] == len(old[part])
    names = [f"first/{i}.txt" for i in range(30)] + [f"more/{i}.txt" for i in range(30, 50)]
    names += [f"last/{i}.txt" for i in range(50, 55)]
    by_hash = {n for n in names if int(hashlib.sha256(n.encode()).hexdigest()[:16], 16) < 0.3 * 2**64}
    assert ids == {"train": set(names) - by_hash, "valid": by_hash}
    with pytest.raises(ValueError, match="has these inputs already"):
        append_corpus([more], out)
    with pytest.raises(ValueError, match="no document in"):
        append_corpus([first / "1.txt"], out)
    with pytest.raises(ValueError, match="expected a dataset that this version"):
        append_corpus([more], tmp_path / "first")
    assert not list(tmp_path.glob(".out*"))


REASONS = (
    "not_utf8",
    "unreadable",
    "too_large",
    "no_text_field",
    "text_not_a_string",
    "empty",
    "nul_bytes",
    "duplicate_id",
    "symlink_loop",
    "bad_json",
)


def test_one_percent_broken_in_ten_ways(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job succeeds, every broken document is counted and named, and all other documents are in the dataset."""
    monkeypatch.setattr(documents, "MAX_BYTES", 100_000)
    root = tmp_path / "in"
    root.mkdir()
    draw, good, broken = random.Random(0), {}, {}
    for shard in range(6):
        lines = []
        for i in range(500):
            id = f"{shard}-{i}"
            content = text(1000 * shard + i, 20)
            kind = draw.randrange(10) if draw.random() < 0.01 else None
            line: str | bytes = json.dumps({"id": id, "text": content})
            place = f"in/{shard}.jsonl:{i + 1}"
            if kind is None or kind in (1, 8):  # these kinds are whole files, below
                good[id] = content
            elif kind == 0:
                line, broken[place] = b'{"text": "\xff"}', "not_utf8"
            elif kind == 2:
                line, broken[place] = json.dumps({"id": id, "text": "m" * 200_000}), "too_large"
            elif kind == 3:
                line, broken[id] = json.dumps({"id": id, "body": content}), "no_text_field"
            elif kind == 4:
                line, broken[id] = json.dumps({"id": id, "text": [content]}), "text_not_a_string"
            elif kind == 5:
                line, broken[id] = json.dumps({"id": id, "text": " \n"}), "empty"
            elif kind == 6:
                line, broken[id] = json.dumps({"id": id, "text": f"{content}\0"}), "nul_bytes"
            elif kind == 7 and i:
                line, broken[f"{shard}-0"] = json.dumps({"id": f"{shard}-0", "text": content}), "duplicate_id"
            elif kind == 9:
                line, broken[place] = '{"text": "half a rec', "bad_json"
            else:
                good[id] = content
            lines.append(line.encode() if isinstance(line, str) else line)
        (root / f"{shard}.jsonl").write_bytes(b"\n".join(lines))
    (root / "cut.txt.gz").write_bytes(gzip.compress(text(1, 500).encode())[:-20])
    (root / "loop").mkdir()
    (root / "loop" / "again").symlink_to(root / "loop")
    (root / "itself.txt").symlink_to(root / "itself.txt")
    (root / "nowhere.txt").symlink_to(root / "gone.txt")
    (root / "huge.txt").write_bytes(b"m" * 100_001)
    broken |= {"in/cut.txt.gz": "unreadable", "in/loop/again": "symlink_loop", "in/itself.txt": "symlink_loop"}
    broken |= {"in/nowhere.txt": "unreadable", "in/huge.txt": "too_large"}
    assert set(broken.values()) == set(REASONS)
    for tasks in (1, 5):
        shard_corpus([root], tmp_path / f"out{tasks}", tokenizer, tasks=tasks, workers=2)
        assert rejects(tmp_path / f"out{tasks}" / "rejects.jsonl") == broken
        found = texts_of(tmp_path / f"out{tasks}", tokenizer)
        assert found == good
    assert all_bytes(tmp_path / "out1") == all_bytes(tmp_path / "out5")
    counts = Counter(broken.values())
    assert sum(counts.values()) > 25


def test_memory_does_not_grow_with_the_corpus(tokenizer: Path, tmp_path: Path) -> None:
    """Parts and shards are written document by document: peak memory does not grow with eight times the corpus."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import data_prep.engine\n"
        "data_prep.engine.ordered_map = lambda function, items, _: map(function, items)\n"
        "from data_prep.shard import shard_corpus\n"
        "shard_corpus([Path(sys.argv[1])], Path(sys.argv[2]), Path(sys.argv[3]), tasks=1)\n"
        "line = next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('VmHWM'))\n"
        "print(line.split()[1])\n"
    )
    peaks = []
    for number, count in enumerate((40, 320)):
        corpus = files(tmp_path / f"in{number}", {f"{i}.txt": text(i, 6000) for i in range(count)})
        words = [sys.executable, "-c", code, corpus, tmp_path / f"out{number}", tokenizer]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    size = DatasetIndex.load(tmp_path / "out1").shards[0].bytes / 2**20
    assert size > 8
    assert np.diff(peaks) < 6, (peaks, size)
