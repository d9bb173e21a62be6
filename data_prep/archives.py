"""Reads the members of tars and zips."""

import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from io import SEEK_END
from pathlib import PurePosixPath
from typing import IO, NamedTuple

from data_prep.formats import SUFFIX_COMPRESSIONS
from data_prep.found import UNREADABLE, Found, seekable

HIDDEN = {"__MACOSX", "__pycache__"}
EMPTY_ZIP = 22  # bytes of a zip without members, and without a comment


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    size: int
    content: IO[bytes] | None  # None if it is too large

    @property
    def parts(self) -> list[str]:
        """Its name without directories, split at the dots, and its suffixes in lower case, without a compression."""
        stem, *suffixes = PurePosixPath(self.name).name.split(".")
        suffixes = [suffix.lower() for suffix in suffixes]
        return [stem, *(suffixes[:-1] if suffixes and suffixes[-1] in SUFFIX_COMPRESSIONS else suffixes)]

    @property
    def key(self) -> str:
        """What the members of one sample of a webdataset share."""
        return str(PurePosixPath(self.name).with_name(self.parts[0]))

    @property
    def id(self) -> str:
        """Its key if it is the only text of a sample of a webdataset, else its name."""
        return self.key if self.parts[1:] in (["txt"], ["json"]) else self.name


def tar_members(stream: IO[bytes], name: str, max_bytes: int) -> Iterator[Member | Found]:
    """Iterate over the files of a tar, or of several tars one after the other.

    tarfile takes a broken or missing header for the end of the archive. Headers are therefore counted here.
    """
    headers: Counter[str] = Counter()

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
            try:
                return super().frombuf(buf, encoding, errors)  # type: ignore[return-value]
            except tarfile.HeaderError as error:
                headers[type(error).__name__] += 1
                raise

    with tarfile.open(fileobj=stream, mode="r|", tarinfo=Header, ignore_zeros=True) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
            if member.isdir():
                continue
            if wrong := _skipped(member.name, member.isfile(), member.linkname):
                yield Found(f"{name}:{member.name}", wrong=wrong)
            elif member.size > max_bytes:
                yield Member(member.name, member.size, None)
            else:
                content = tar.extractfile(member)
                assert content is not None, "a regular file"
                yield Member(member.name, member.size, seekable(content))
    if broken := headers["InvalidHeaderError"] + headers["TruncatedHeaderError"]:
        detail = f"{broken:,} blocks of 512 bytes, where a header is expected, are none: members may be missing"
        yield Found(name, wrong=("unreadable", detail))
    elif not headers["EOFHeaderError"]:
        yield Found(name, wrong=("unreadable", "the archive has no end: it was cut off between two members"))


def zip_members(stream: IO[bytes], name: str, max_bytes: int) -> Iterator[Member | Found]:
    with zipfile.ZipFile(stream) as archive:
        if not archive.infolist() and stream.seek(0, SEEK_END) > EMPTY_ZIP + len(archive.comment):
            yield Found(name, wrong=("unreadable", "the archive lists no members, but holds more than its list"))
        for member in archive.infolist():
            if member.is_dir():
                continue
            is_link = stat.S_ISLNK(member.external_attr >> 16)
            if wrong := _skipped(member.filename, not is_link, "another file"):
                yield Found(f"{name}:{member.filename}", wrong=wrong)
                continue
            content = None
            try:
                if member.file_size <= max_bytes:
                    with archive.open(member) as f:
                        content = seekable(f)
            except (*UNREADABLE, RuntimeError) as error:  # a RuntimeError for a member with a password
                yield Found(f"{name}:{member.filename}", wrong=("unreadable", str(error)))
            else:
                yield Member(member.filename, member.file_size, content)


def _skipped(name: str, is_file: bool, target: str) -> tuple[str, str] | None:
    """Return why a member of an archive is not read: it is hidden, as in a directory, or no file; else None."""
    if any(
        part in HIDDEN or (part.startswith(".") and part not in (".", "..")) for part in PurePosixPath(name).parts
    ):
        return "hidden", "its name, or that of its directory, begins with a dot or is that of a cache"
    return None if is_file else ("not_a_file", f"a link to {target}" if target else "a device or pipe")
