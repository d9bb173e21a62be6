"""Reads slices of documents from a dataset's local shards by memory map; remote.py reads remote shards."""

from functools import lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .index import DatasetIndex

OPEN_SHARDS = 128  # each memory map holds a file descriptor, and a process may often have only 1,024


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
        path, expected = self.index.root / self.index.shards[shard].name, self.index.shards[shard].bytes
        if not path.is_file():
            raise FileNotFoundError(f"{path}: shard is missing, though the index of its dataset lists it")
        # Reading past the end of a map raises SIGBUS instead of an exception, so the size is checked first.
        if (found := path.stat().st_size) != expected:
            raise ValueError(
                f"{path}: found {found:,} bytes, expected {expected:,} by the index: truncated or replaced"
            )
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
