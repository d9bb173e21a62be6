"""What the readers of the formats find in a file, and what they raise for a file that is broken."""

import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import IO, Any, NamedTuple

import pyarrow

CHUNK = 1 << 20  # bytes of a text that are read at once; what is smaller is held in memory
# What the libraries raise for a file that is broken or cut off; pyarrow's input/output errors are OSErrors.
UNREADABLE = (
    OSError,
    EOFError,
    lzma.LZMAError,
    zlib.error,
    pyarrow.ArrowException,
    tarfile.TarError,
    zipfile.BadZipFile,
    NotImplementedError,  # of zipfile, for a compression or version that it does not know
)


class Found(NamedTuple):
    """What a file holds at one place: a record, a text with or without a record about it, or what is wrong there."""

    location: str  # name of the file and, in a file of several documents, the place in it
    record: dict[str, Any] | None = None
    text: bytes | Iterator[bytes] | None = None  # parts of a text longer than CHUNK; None: the record holds the text
    wrong: tuple[str, str] | None = None  # reason and detail of a Reject
    member: str = ""  # path, in the file, of the member of an archive that holds it


def seekable(stream: IO[bytes]) -> IO[bytes]:
    """Return what a stream holds as a file that is read in any order: in memory if it is small, else on disk."""
    if len(start := stream.read(CHUNK)) < CHUNK:
        return BytesIO(start)
    copy = tempfile.TemporaryFile()  # noqa: SIM115  removed when nothing refers to it
    copy.write(start)
    shutil.copyfileobj(stream, copy, CHUNK)
    copy.seek(0)
    return copy
