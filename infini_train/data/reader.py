"""Reads slices of documents from a dataset's local shards by memory map; remote.py reads remote shards."""

import json
from functools import lru_cache
from tarfile import BLOCKSIZE, HeaderError, TarInfo
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .index import DatasetIndex

OPEN_SHARDS = 128  # each memory map holds a file descriptor, and a process may often have only 1,024

ABOUT_BYTES = 1 << 16  # a KEY.json in front of the tokens is looked for in so many bytes


class TokenReader:
    """Reads any slice of any document of a dataset.

    The only state is a cache of memory maps, which are opened on first use. A forked or unpickled reader therefore
    works like the original, and it does not matter which worker reads what.
    """

    def __init__(self, index: DatasetIndex):
        self.index = index
        self._dtype = np.dtype(index.dtype).newbyteorder("<")
        self._shard = lru_cache(OPEN_SHARDS)(self._map)

    def __reduce__(self) -> tuple[type[Self], tuple[DatasetIndex]]:
        return type(self), (self.index,)

    def read(self, doc: int, offset: int, count: int) -> NDArray[np.unsignedinteger]:
        """Return tokens [offset, offset + count) of document `doc`: [count] in the dataset's dtype, read-only.

        Raises:
            FileNotFoundError: the shard is missing.
            ValueError: the shard's size is not the one in the index, or a token is outside the vocabulary.
        """
        index = self.index
        shard, start, size = self._locate(doc, offset, count)
        tokens = self._bytes(shard, start, size).view(self._dtype)
        if tokens.max() >= index.vocab_size:
            at = int((tokens >= index.vocab_size).argmax())
            raise ValueError(
                f"{index.root / index.shards[shard].name}: document {doc} has token {tokens[at]} at {offset + at}, "
                f"expected tokens below the vocabulary size {index.vocab_size}"
            )
        return tokens

    def id_of(self, doc: int) -> str | None:
        """Return the id of document `doc`, from KEY.json next to its tokens; without one, KEY; or None."""
        index = self.index
        shard, start, size = self._locate(doc, 0, int(index.tokens_D[doc]))
        tokens = self._member(shard, start - BLOCKSIZE)
        if tokens is None:
            return None
        key = tokens.name.removesuffix(".tokens.bin")
        behind = start + -(-size // BLOCKSIZE) * BLOCKSIZE
        before = range(start - 3 * BLOCKSIZE, start - 3 * BLOCKSIZE - ABOUT_BYTES, -BLOCKSIZE)
        for header in (*before, behind):
            about = self._member(shard, header)
            if about is not None and about.name == f"{key}.json":
                content = json.loads(self._bytes(shard, header + BLOCKSIZE, about.size).tobytes())
                return str(content.get("id", key)) if isinstance(content, dict) else key
        return key

    def _member(self, shard: int, header: int) -> TarInfo | None:
        """Return the member of a shard whose header is at this byte; None if there is no header."""
        if not 0 <= header <= self.index.shards[shard].bytes - BLOCKSIZE:
            return None
        try:
            return TarInfo.frombuf(self._bytes(shard, header, BLOCKSIZE).tobytes(), "utf-8", "surrogateescape")
        except HeaderError:
            return None

    def prefetch(self, doc: int, offset: int, count: int) -> None:
        """Announce a later `read` of the same slice. Here it does nothing, because the kernel reads ahead."""

    def _locate(self, doc: int, offset: int, count: int) -> tuple[int, int, int]:
        """Return the shard, first byte and number of bytes of a slice."""
        index = self.index
        assert offset >= 0 and count > 0 and offset + count <= index.tokens_D[doc], (doc, offset, count)
        itemsize = self._dtype.itemsize
        return int(index.shard_D[doc]), int(index.offset_D[doc]) + offset * itemsize, count * itemsize

    def _bytes(self, shard: int, start: int, size: int) -> NDArray[np.uint8]:
        return self._shard(shard)[start : start + size]

    def _map(self, shard: int) -> NDArray[np.uint8]:
        # Reading past the end of a map raises SIGBUS instead of an exception, so the size is checked first.
        path = self.index.checked_path(self.index.shards[shard])
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
