"""The files of a corpus as tasks read them, and as the working directory lists them."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from data_prep.formats import HEAD_BYTES, PLAIN_TEXT, Format
from infini_train.data.remote import RemoteFiles, is_remote

COPIED = 4 << 20  # bytes that are fetched at once of a file at a URL


@dataclass(frozen=True)
class InputFile:
    """A file to read."""

    path: Path | str  # a string for a URL
    name: str  # path relative to the parent of the given input, so that it does not depend on where the input lies
    size: int
    mtime_ns: int  # of a URL, a number that changes with what the file system tells of its version
    format: Format = PLAIN_TEXT
    wrong: tuple[str, str] | None = None  # reason and detail of a Reject, if the file is known to be unreadable

    def open(self) -> IO[bytes]:
        """Open the file; one at a URL is copied to a temporary file before.

        Raises:
            OSError: the file cannot be read.
            RuntimeError: it has another size than when it was found, or the URL cannot be reached.
        """
        if isinstance(self.path, str):
            return self._copy()
        stream = open(self.path, "rb")  # noqa: SIM115  the caller closes it
        # Tasks divide the work by the sizes that were found at first, so files must not change meanwhile.
        if (found := os.fstat(stream.fileno()).st_size) != self.size:
            stream.close()
            raise RuntimeError(f"{self.path} has changed: found {found:,} bytes, expected {self.size:,}")
        return stream

    def head(self) -> IO[bytes]:
        """Open the file to read its first bytes only. Raises what `open` raises."""
        return BytesIO(self._fetch(0, min(self.size, HEAD_BYTES))) if isinstance(self.path, str) else self.open()

    def _copy(self) -> IO[bytes]:
        copy = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
        for start in range(0, self.size, COPIED):
            copy.write(self._fetch(start, min(COPIED, self.size - start)))
        copy.seek(0)
        return copy

    def _fetch(self, start: int, size: int) -> bytes:
        directory, _, name = str(self.path).rpartition("/")
        try:
            return _remote_files(directory).part(name, start, size) if size else b""
        except OSError as error:  # no fault of the file, which would be left out
            raise RuntimeError(str(error)) from None


_remote_files = lru_cache(RemoteFiles)


def fingerprint_inputs(files: list[InputFile]) -> str:
    """Return a hexadecimal sha256 of names, sizes and modification times, which identifies the inputs of a run."""
    stats = [(file.name, file.size, file.mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def inputs_to_json(files: list[InputFile]) -> bytes:
    """Serialise files, one line of JSON for each; `load_inputs` reads them back."""
    return b"".join(json.dumps(asdict(file) | {"path": str(file.path)}).encode() + b"\n" for file in files)


def load_inputs(path: Path) -> list[InputFile]:
    """Read a file that `inputs_to_json` wrote. Raises ValueError if another version wrote it."""
    try:
        with open(path, "rb") as f:
            return [_from_json(json.loads(line)) for line in f]
    except (KeyError, TypeError):
        raise ValueError(f"{path} was written by another version: remove {path.parent} and begin again") from None


def _from_json(line: dict[str, Any]) -> InputFile:
    path = line["path"] if is_remote(line["path"]) else Path(line["path"])
    layers = tuple(line["format"]["layers"])
    wrong = line["wrong"] and tuple(line["wrong"])
    found = Format(**line["format"] | {"layers": layers})
    return InputFile(**line | {"path": path, "format": found, "wrong": wrong})
