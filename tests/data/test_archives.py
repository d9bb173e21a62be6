"""Members of tar and zip archives: each is read, or told by name."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.helpers.corpora import text
from tests.helpers.reading import read, tar, zipped


@pytest.mark.parametrize(("name", "pack"), [("a.tar", tar), ("a.zip", zipped)])
def test_every_member_is_read_or_told(tmp_path: Path, name: str, pack: type) -> None:
    members = {
        "book/chapter.1.txt": "chapter 1",
        "book/chapter.2.txt": "chapter 2",
        "src/main.c": "int main;",
        "src/main.h": "main();",
        "src/Makefile": "all:",
        "src/.git/HEAD": "ref",
        "__MACOSX/x.txt": "resource fork",
        "1.txt": "sample 1",
        "1.json": '{"stars": 5}',
        "1.cls": "3",
        "2.json": json.dumps({"text": "sample 2"}),
        "3.cls": "4",
        "U.TXT": "sample U",
        "U.JSON": '{"stars": 5}',
        "3.jpg": "\0picture",
        "4.txt.gz": gzip.compress(b"sample 4"),
        "5.doc": "{\\rtf1",
    }
    (tmp_path / name).write_bytes(
        pack({member: data.encode() if isinstance(data, str) else data for member, data in members.items()})
    )
    texts, rejects, summary = read(tmp_path / name)
    assert texts[:7] == ["chapter 1", "chapter 2", "int main;", "main();", "all:", "sample 1", "sample 2"]
    assert texts[7:] == ["sample U", "sample 4"]
    assert rejects == {
        f"{name}:src/.git/HEAD": "hidden",
        f"{name}:__MACOSX/x.txt": "hidden",
        f"{name}:3.jpg": "nul_bytes",
        f"{name}:5.doc": "not_read",
    }
    kind = name[2:]
    assert summary.kinds[f"{kind}: metadata"]["files"] == 4
    counted = sum(counts["files"] for counts in summary.kinds.values())
    assert counted == len(members) - 2  # those that are hidden


def test_members_that_are_taken_as_texts(tmp_path: Path) -> None:
    """JSON and tables of a source tree, and other formats, also in an archive in an archive."""
    members = {"src/package.json": b'{"name": "x"}', "src/a.csv": b"a,b\n1,2\n", "src/b.ps": b"%!PS\n"}
    (tmp_path / "a.zip").write_bytes(zipped(members | {"inner.tgz": tar(members, "w:gz")}))
    assert set(read(tmp_path / "a.zip")[1].values()) == {"no_text_field", "not_read"}
    texts, rejects, _ = read(tmp_path / "a.zip", as_text=["*.json", "*/src/*.csv", "b.ps"])
    assert texts == 2 * [content.decode() for content in members.values()] and not rejects


def test_repeated_names_links_and_concatenated_tars(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in (("a.txt", b"first"), ("a.txt", b"second")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        archive.addfile(link)
    (tmp_path / "a.tar").write_bytes(out.getvalue() + tar({"c.txt": b"third"}))
    texts, rejects, _ = read(tmp_path / "a.tar")
    assert texts == ["first", "second", "third"]  # the second has an id that planning rejects
    assert rejects == {"a.tar:b.txt": "not_a_file"}


def test_broken_tars_are_told(tmp_path: Path) -> None:
    """tarfile takes these for the end of the archive and says nothing."""
    path = tmp_path / "a.tar"
    whole = tar({f"{i}.txt": text(i, 20).encode() for i in range(4)})
    header = whole.index(b"2.txt")
    path.write_bytes(whole[:header] + b"broken" + whole[header + 6 :])
    with tarfile.open(path, mode="r|") as archive:
        assert len(archive.getnames()) == 2
    texts, rejects, _ = read(path)
    assert texts == [text(i, 20) for i in (0, 1, 3)] and rejects == {"a.tar": "unreadable"}
    for cut in (header, header + 100, header + 512 + 10):
        path.write_bytes(whole[:cut])
        texts, rejects, _ = read(path)
        assert texts[:2] == [text(i, 20) for i in (0, 1)] and set(rejects.values()) == {"unreadable"}
    path.write_bytes(b"")
    assert read(path)[1] == {"a.tar": "empty"}


def test_zip_with_a_broken_member_and_an_encrypted_one(tmp_path: Path) -> None:
    content = bytearray(zipped({f"{i}.txt": text(i, 20).encode() for i in range(4)}))
    content[content.index(b"1.txt") + 10] ^= 0xFF
    directory = content.index(b"PK\x01\x02")
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02", directory + 4) + 4)
    content[second + 8] |= 1  # says that 2.txt needs a password
    (tmp_path / "a.zip").write_bytes(content)
    texts, rejects, _ = read(tmp_path / "a.zip")
    assert texts == [text(0, 20), text(3, 20)]
    assert rejects == {"a.zip:1.txt": "unreadable", "a.zip:2.txt": "unreadable"}
    content[directory + 6] = 250  # the version of zip that it needs
    (tmp_path / "a.zip").write_bytes(content)
    assert read(tmp_path / "a.zip")[:2] == ([], {"a.zip": "unreadable"})


def test_archives_in_archives_are_bounded(tmp_path: Path) -> None:
    content = b"a text"
    for _ in range(5):
        content = zipped({"x": content})
    (tmp_path / "a.zip").write_bytes(content)
    texts, rejects, _ = read(tmp_path / "a.zip")
    assert not texts and list(rejects.values()) == ["not_read"]
