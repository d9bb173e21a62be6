"""Files and directories that appear whole or not at all, and digests of their contents."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

DIGEST_BYTES = 16


def digest_of(content: bytes) -> bytes:
    """blake2b, of DIGEST_BYTES: of a block, a text or an id."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path`, whole and on disk, as the block ends; or never, if it raises."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            yield f
            f.flush()
            os.fchmod(f.fileno(), 0o644)  # mkstemp makes files that only their owner can read
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(path.parent)  # the rename itself


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that appears at `path`, whole and on disk, as the block ends; or never, if it raises.

    Raises FileExistsError if there is something at `path` already.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(path.parent)


def check_new(path: Path) -> None:
    """Raises FileExistsError if `path` exists."""
    if path.exists():
        raise FileExistsError(f"{path}: exists; name a directory that does not")


def replace_directory(old: Path, new: Path) -> None:
    """Move the directory `new`, on the same file system, to `old` in place of what is there."""
    replaced = old.with_name(f".{old.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    with suppress(FileNotFoundError):
        old.rename(replaced)
    try:
        new.rename(old)
    except OSError:
        with suppress(FileNotFoundError):
            replaced.rename(old)
        raise
    sync(old.parent)
    shutil.rmtree(replaced, ignore_errors=True)
