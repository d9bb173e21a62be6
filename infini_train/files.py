"""Files and directories that appear complete or not at all, and digests of their contents."""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

DIGEST_BYTES = 16
WRITTEN_BYTES = 1 << 18  # that are written at once; pages, the default, take many calls of the system
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what only a write can report
UMASK = os.umask(0)  # the process's own can only be read by setting it, which is done once, before there are threads
os.umask(UMASK)


def plain_name(name: object, source: object) -> str:
    """Return a file name that was read from a file, if it names something directly in the directory it belongs to.

    A file from elsewhere could otherwise make this program read or replace any file of the user.

    Args:
        name: what the file says.
        source: the file, and the field if it has several, for the message.

    Raises:
        ValueError: it is an absolute path, leads to another directory, or is no name at all.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise ValueError(f"{source}: found {name!r}, expected the plain name of a file, without a directory")
    return name


def not_a_link(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=not_a_link)`. Raises OSError if it is a link.

    A link in a run from elsewhere could lead to any file of the user.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def allow_reading(path: Path) -> None:
    """Set a file's permissions to what the umask says, where a library makes files that only their owner can read."""
    path.chmod(0o666 & ~UMASK)


def digest_of(content: bytes) -> bytes:
    """Return the blake2b digest of a block, a text or an id, DIGEST_BYTES long."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def xxh3_of_file(path: Path) -> str:
    """Return the 128-bit XXH3 of a file's bytes in hexadecimal: a fast digest against damage, not against forgery."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on disk. Raises OSError that names the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise named(error, path) from error
    finally:
        os.close(descriptor)


def named(error: OSError, path: Path) -> OSError:
    """Return an error of a system call that knew only the number of the open file, with the file's name."""
    return OSError(error.errno, error.strerror, str(path)) if error.filename is None else error


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that appears at `path`, complete and on disk, unless the block raises an error."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb", WRITTEN_BYTES) as f:
            yield f
            f.flush()
            os.fchmod(f.fileno(), 0o666 & ~UMASK)  # mkstemp makes files that only their owner can read
            try:
                os.fsync(f.fileno())
            except OSError as error:
                raise named(error, path) from error
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise named(error, path) from error
        raise
    sync(path.parent)  # makes the rename itself durable


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears at `path`, complete and on disk, and read it back.

    Raises:
        OSError: it could not be written, or holds something else.
    """
    with atomic_file(path) as file:
        file.write(content)
    if path.read_bytes() != content:
        raise OSError(f"{path}: could not be written: what was read back is not what was written")


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a directory to fill that appears at `path`, complete and on disk, unless the block raises an error.

    Args:
        path: the final place of the directory; parents are created.
        replace: replace what is at `path`.

    Raises:
        FileExistsError: something exists at `path`, and `replace` is false.
        ValueError: another process is writing to `path`.
    """
    if not replace:
        check_new(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(exist_ok=True)
    with directory_lock(partial, path):
        try:
            for left_over in partial.iterdir():  # from a process that was killed
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            yield partial
            for file in partial.rglob("*"):
                sync(file)
            sync(partial)
            if replace:
                replace_directory(path, partial)
            else:
                os.rename(partial, path)
                sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def check_new(path: Path) -> None:
    """Raise FileExistsError if `path` exists."""
    if path.exists():
        raise FileExistsError(f"{path}: exists; name a directory that does not")


@contextmanager
def directory_lock(directory: Path, output: Path) -> Iterator[None]:
    """Hold an exclusive lock on `directory`, in which `output` is being made.

    File systems without locks are accepted. Raises ValueError if another process of this machine holds the lock.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {output}") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def replace_directory(old: Path, new: Path) -> None:
    """Move the directory `new`, on the same file system, to `old` in place of what is there.

    If the move fails, what was at `old` is put back and the error is raised.
    """
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
