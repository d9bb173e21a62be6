"""Remembers the texts and ids of all documents of a dataset, by digests, to leave duplicates out."""

import sqlite3
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.work import DocumentHeader
from infini_train.files import DIGEST_BYTES, digest_of

SEEN = "seen.npz"  # name of the file, in a dataset
HELD = 1_000_000  # digests that are held in memory; more of them go to a temporary file
CACHE_KIB = 65_536  # memory for that file
ROWS = 65_536  # digests that are read or written at once


class Digests:
    """A set of digests: in memory, with about 100 bytes for each, or, if it is large, in a temporary SQLite file."""

    def __init__(self) -> None:
        self._held: dict[bytes, None] = {}
        self._file: sqlite3.Connection | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """Add a digest and return whether it is new."""
        if self._file is None:
            is_new = digest not in self._held
            self._held[digest] = None
            if len(self._held) > HELD:
                self._spill()
        else:
            is_new = self._file.execute("insert or ignore into digests values (?)", (digest,)).rowcount > 0
        self._count += is_new
        return is_new

    def remove(self, digest: bytes) -> None:
        """Remove a digest that was added."""
        if self._file is None:
            del self._held[digest]
        else:
            self._file.execute("delete from digests where digest = ?", (digest,))
        self._count -= 1

    def __iter__(self) -> Iterator[bytes]:
        """Iterate over the digests, in an order that depends on what was added alone."""
        if self._file is None:
            return iter(self._held)
        return (digest for (digest,) in self._file.execute("select digest from digests order by digest"))

    def _spill(self) -> None:
        self._file = sqlite3.connect("", isolation_level=None)  # a file that goes with the connection
        self._file.execute(f"pragma cache_size = -{CACHE_KIB}")
        self._file.execute("create table digests (digest blob primary key) without rowid")
        self._file.execute("begin")
        self._file.executemany("insert into digests values (?)", ((digest,) for digest in self._held))
        self._held = {}


class Seen:
    """The texts and ids of all documents so far.

    `path` is the file of the dataset to which documents are appended, None for a new dataset.
    """

    def __init__(self, path: Path | None):
        self._texts, self._ids = Digests(), Digests()
        if path:
            for name, digests in self._sets().items():
                for digest in _read(path, name):
                    digests.add(digest)

    def fault(self, header: DocumentHeader) -> tuple[str, str] | None:
        """Return reason and detail if a document is a duplicate; otherwise record it as seen and return None."""
        text = bytes.fromhex(header.digest)
        if not self._texts.add(text):
            return "duplicate", "its text is that of an earlier document"
        if not self._ids.add(digest_of(header.id.encode(errors="surrogatepass"))):
            self._texts.remove(text)
            return "duplicate_id", "an earlier document with another text has this id: --id_field names another field"
        return None

    def save(self, path: Path) -> None:
        """Write the digests, for documents that will be appended later, as arrays that `numpy.load` reads."""
        with zipfile.ZipFile(path, "w") as archive:
            for name, digests in self._sets().items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as f:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(digests), DIGEST_BYTES)}
                    np.lib.format.write_array_header_1_0(f, header)
                    rows = iter(digests)
                    while block := b"".join(islice(rows, ROWS)):
                        f.write(block)

    def _sets(self) -> dict[str, Digests]:
        return {"texts": self._texts, "ids": self._ids}


def _read(path: Path, name: str) -> Iterator[bytes]:
    """Iterate over the digests of an array of the file at `path`."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as f:
        np.lib.format.read_magic(f)
        np.lib.format.read_array_header_1_0(f)
        while block := f.read(ROWS * DIGEST_BYTES):
            for start in range(0, len(block), DIGEST_BYTES):
                yield block[start : start + DIGEST_BYTES]
