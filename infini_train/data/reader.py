"""Token slices out of a dataset's shards, here by memory map; remote.py reads those that lie elsewhere."""

from functools import lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .index import DatasetIndex

OPEN_SHARDS = 128  # each map holds a file descriptor, of which a process often gets only 1,024


class TokenReader:
    """Reads any slice of any document of a dataset.

    Stateless but for a cache of maps, opened where they are first used: a forked or unpickled reader works as the
    first one does, so it does not matter which worker reads what.
    """

    def __init__(self, index: DatasetIndex):
        self.index = index
        self._dtype = np.dtype(index.dtype).newbyteorder("<")
        self._shard = lru_cache(OPEN_SHARDS)(self._map)

    def __reduce__(self) -> tuple[type[Self], tuple[DatasetIndex]]:
        return type(self), (self.index,)

    def read(self, doc: int, offset: int, count: int) -> NDArray[np.unsignedinteger]:
        """Tokens [offset, offset + count) of document `doc`, [count] in the dataset's dtype, read-only.

        Raises FileNotFoundError if the shard is missing, ValueError if its size is not what the index says or a
        token lies outside the vocabulary; both name the file.
        """
        index = self.index
        shard, start, size = self._place(doc, offset, count)
        tokens = self._bytes(shard, start, size).view(self._dtype)
        if tokens.max() >= index.vocab_size:
            at = int((tokens >= index.vocab_size).argmax())
            raise ValueError(
                f"{index.root / index.shards[shard].name}: document {doc} has token {tokens[at]} at {offset + at}, "
                f"expected tokens below the vocabulary size {index.vocab_size}"
            )
        return tokens

    def prefetch(self, doc: int, offset: int, count: int) -> None:
        """Nothing: the kernel reads ahead."""

    def _place(self, doc: int, offset: int, count: int) -> tuple[int, int, int]:
        """Shard, first byte and number of bytes of a slice."""
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
        if (found := path.stat().st_size) != expected:  # beyond the end of a map waits SIGBUS, not an exception
            raise ValueError(
                f"{path}: found {found:,} bytes, expected {expected:,} by the index: truncated or replaced"
            )
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
