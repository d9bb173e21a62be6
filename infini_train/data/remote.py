"""Remote datasets (s3://, gs://, https:// and whatever else fsspec supports), read block by block through a cache.

The cache is a directory on a local disk. All processes of a node share it, and it is kept below a size limit. Every
block is checked against its digest in the index whenever a process loads it, so that neither the network nor the disk
can change a token. A request that fails is repeated with growing pauses; if it keeps failing, the job ends with one
message.
"""

import fcntl
import hashlib
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import fsspec
import numpy as np
from fsspec.asyn import sync
from numpy.typing import NDArray

from infini_train.files import allow_reading, atomic_file, digest_of, sha256_of_file

from .index import BLOCK_BYTES, INDEX_JSON, DatasetIndex, Remote, check_names
from .reader import TokenReader

TIMEOUT = 60.0  # seconds for one request of a block or an index
PATIENCE = 300.0  # seconds after which a request is no longer repeated
LONGEST_PAUSE = 20.0  # seconds between two tries
BLOCKS_IN_MEMORY = 64  # checked blocks that each process keeps in memory
FETCHERS = 4  # threads of each process that prefetch blocks
LEAST_CACHE = 64 * BLOCK_BYTES
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, ModuleNotFoundError)

log = logging.getLogger(__name__)


def is_remote(where: str | Path) -> bool:
    """Return whether a dataset is given by a URL."""
    return "://" in str(where)


def default_cache() -> Path:
    """Return this program's directory in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infini-train"


def load_index(where: str | Path, cache: Path | None = None, cache_bytes: int = 50 << 30) -> DatasetIndex:
    """Load the index of the dataset in a directory or at a URL.

    The index and the tokenizer of a remote dataset are copied into the cache.

    Args:
        where: directory or URL of the dataset.
        cache: directory of the cache; None: `default_cache()`.
        cache_bytes: limit on the size of all cached blocks.

    Raises:
        FileNotFoundError, ValueError: see DatasetIndex.load.
        ValueError: a remote dataset's index has no block digests, or the cache is too small.
        OSError: a remote dataset cannot be reached.
    """
    if not is_remote(where):
        return DatasetIndex.load(where)
    if cache_bytes < LEAST_CACHE:
        raise ValueError(f"cache_bytes: found {cache_bytes:,}, expected at least {LEAST_CACHE:,}")
    url = str(where).rstrip("/")
    files = RemoteFiles(url)
    root = (cache or default_cache()) / "datasets" / hashlib.sha256(url.encode()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    index_json = files.whole(INDEX_JSON)
    try:
        document = json.loads(index_json)
        check_names(document)
        wanted = {document["index_npz"]: document["index_npz_sha256"]}
        wanted[document["tokenizer"]["file"]] = document["tokenizer"]["sha256"]
    except ValueError as error:
        raise ValueError(f"{url}/{INDEX_JSON}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{url}/{INDEX_JSON}: found {error!r}, expected an index of this version") from None
    for name, sha256 in wanted.items():
        if not (root / name).is_file() or sha256_of_file(root / name) != sha256:
            content = files.whole(name, sha256)
            with atomic_file(root / name) as f:
                f.write(content)
    if "tokenizer.json" in wanted:  # a Hugging Face tokenizer, which names BOS and EOS in a second file
        with suppress(FileNotFoundError), atomic_file(root / "tokenizer_config.json") as f:
            f.write(files.whole("tokenizer_config.json"))
    with atomic_file(root / INDEX_JSON) as f:
        f.write(index_json)
    index = DatasetIndex.load(root)
    if index.block_digests is None:
        raise ValueError(
            f"{url}: found no digests of blocks in its index, expected them for reading over a network: "
            "run `infini-train prep index --overwrite` on the dataset where it lies"
        )
    index.remote = Remote(url, str(cache or default_cache()), cache_bytes)
    RemoteReader(index).read(index.documents - 1, 0, 1)  # missing shards are reported here rather than in a worker
    return index


def reader_of(index: DatasetIndex) -> TokenReader:
    """Return a reader of a local or remote dataset's tokens."""
    return RemoteReader(index) if index.remote else TokenReader(index)


class RemoteFiles:
    """Reads the files below a URL. It may be used in threads, and goes on working in a forked process."""

    def __init__(self, url: str):
        self.url = url
        self._lock = Lock()
        # By process id: an open connection does not survive a fork.
        self._systems: dict[int, tuple[Any, str]] = {}

    def whole(self, name: str, sha256: str | None = None) -> bytes:
        """Return the content of a file. Raises OSError if no try succeeds, or if none has the expected sha256."""

        def fetch() -> bytes:
            content = self._request(name)
            if sha256 and (found := hashlib.sha256(content).hexdigest()) != sha256:
                raise OSError(f"found sha256 {found[:12]}..., expected {sha256[:12]}...")
            return content

        return self._retry(f"{self.url}/{name}", fetch)

    def part(self, name: str, start: int, size: int, digest: bytes | None = None) -> bytes:
        """Return a part of a file.

        Args:
            name: name of the file.
            start: first byte of the part.
            size: bytes of the part.
            digest: expected digest of the part; None: not checked.

        Raises:
            OSError: no try succeeds, or none has the expected size and digest.
        """

        def fetch() -> bytes:
            content = self._request(name, start, start + size)
            if len(content) != size:
                raise OSError(f"found {len(content):,} bytes, expected {size:,} (does the server know ranges?)")
            if digest is not None and digest_of(content) != digest:
                raise OSError("found other bytes than those of the index's digest")
            return content

        return self._retry(f"{self.url}/{name}, bytes from {start:,}", fetch)

    def _request(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        with self._lock:
            if os.getpid() not in self._systems:
                self._systems = {os.getpid(): fsspec.core.url_to_fs(self.url, skip_instance_cache=True)}
            system, root = self._systems[os.getpid()]
        path = f"{root.rstrip('/')}/{name}"
        if system.async_impl:  # other file systems offer no way to time out
            return sync(system.loop, system._cat_file, path, start=start, end=end, timeout=TIMEOUT)
        return system.cat_file(path, start=start, end=end)

    @staticmethod
    def _retry(what: str, fetch: Callable[[], bytes]) -> bytes:
        """Call `fetch` until it succeeds, for PATIENCE seconds; `what` is named in messages."""
        begin, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return fetch()
            except PERMANENT_ERRORS as error:
                raise type(error)(f"{what}: {error}") from None
            except Exception as error:  # every file system raises errors of its own
                message = f"{type(error).__name__}: {error}".rstrip(": ")
                if time.monotonic() - begin > PATIENCE:
                    raise OSError(f"{what}: {message}; given up after {tries} tries") from error
                log.warning("%s: %s; try %d", what, message, tries + 1)
                # The pause is random, so that a thousand ranks do not all retry at the same moment.
                time.sleep(min(LONGEST_PAUSE, 0.1 * 2**tries) * random.SystemRandom().uniform(0.5, 1))


class BlockCache:
    """Blocks of shards on local disk, named by their digest; the least recently read are evicted first.

    Args:
        directory: where the blocks are stored.
        limit: bytes of all blocks together.
    """

    def __init__(self, directory: Path, limit: int):
        self.directory, self.limit = directory / "blocks", limit
        self.directory.mkdir(parents=True, exist_ok=True)
        self._written = 0

    def get(self, digest: bytes, fetch: Callable[[], bytes]) -> bytes:
        """Return the block with this digest from disk, or fetch and store it, in one process of the node only."""
        if (content := self._found(digest)) is not None:
            return content
        with self._locked(digest):
            if (content := self._found(digest)) is None:
                content = fetch()
                self._put(digest, content)
        return content

    def has(self, digest: bytes) -> bool:
        return self._path(digest).exists()

    def _path(self, digest: bytes) -> Path:
        return self.directory / digest.hex()

    def _found(self, digest: bytes) -> bytes | None:
        path = self._path(digest)
        try:
            content = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        # A full disk or a crash of the machine may have damaged the file.
        return content if digest_of(content) == digest else None

    def _put(self, digest: bytes, content: bytes) -> None:
        handle, temporary = tempfile.mkstemp(prefix=".", dir=self.directory)
        with os.fdopen(handle, "wb") as f:
            f.write(content)
        allow_reading(Path(temporary))
        os.replace(temporary, self._path(digest))
        self._written += len(content)
        # A hundred processes may each write this much before one of them makes room.
        if self._written >= self.limit // 1000:
            self._written = 0
            self._make_room()

    def _make_room(self) -> None:
        blocks = []
        for entry in os.scandir(self.directory):
            with suppress(FileNotFoundError):  # other processes may remove blocks at the same time
                status = entry.stat()
                blocks.append((status.st_mtime, status.st_size, entry.path))
        excess = sum(size for _, size, _ in blocks) - self.limit * 9 // 10
        for _, size, path in sorted(blocks):
            if excess <= 0:
                return
            Path(path).unlink(missing_ok=True)
            excess -= size

    @contextmanager
    def _locked(self, digest: bytes) -> Iterator[None]:
        descriptor = os.open(self.directory.parent / f"lock-{digest[0] % 64:02d}", os.O_RDWR | os.O_CREAT)
        try:
            with suppress(OSError):  # on a file system without locks some blocks are fetched twice
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class RemoteReader(TokenReader):
    """TokenReader of a remote dataset."""

    def __init__(self, index: DatasetIndex):
        super().__init__(index)
        assert index.remote is not None and index.block_digests is not None
        self.files = RemoteFiles(index.remote.url)
        self.cache = BlockCache(Path(index.remote.cache), index.remote.cache_bytes)
        blocks = [-(-shard.bytes // BLOCK_BYTES) for shard in index.shards]
        self._first_block = np.cumsum([0, *blocks])
        self._block = lru_cache(BLOCKS_IN_MEMORY)(self._checked_block)
        self._fetching_in = -1  # id of the process that runs the prefetching threads
        self._wanted: SimpleQueue[tuple[int, int]] = SimpleQueue()

    def prefetch(self, doc: int, offset: int, count: int) -> None:
        """Start to fetch the blocks that a later `read` of the same slice will need; return at once."""
        if self._fetching_in != os.getpid():  # a forked process does not inherit threads
            self._fetching_in, self._wanted = os.getpid(), SimpleQueue()
            for _ in range(FETCHERS):
                # Daemon threads, so that a process can end while a server does not answer.
                Thread(target=self._fetch_ahead, args=(self._wanted,), daemon=True).start()
        shard, start, size = self._locate(doc, offset, count)
        for number in range(start // BLOCK_BYTES, (start + size - 1) // BLOCK_BYTES + 1):
            if not self.cache.has(self._digest(shard, number)):
                self._wanted.put((shard, number))

    def _fetch_ahead(self, wanted: "SimpleQueue[tuple[int, int]]") -> None:
        while True:
            shard, number = wanted.get()
            with suppress(OSError):  # an error that persists is raised when the block is read
                self.cache.get(self._digest(shard, number), partial(self._fetch, shard, number))

    def _bytes(self, shard: int, start: int, size: int) -> NDArray[np.uint8]:
        numbers = range(start // BLOCK_BYTES, (start + size - 1) // BLOCK_BYTES + 1)
        blocks = [self._block(shard, number) for number in numbers]
        found = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        start -= numbers[0] * BLOCK_BYTES
        return found[start : start + size]

    def _checked_block(self, shard: int, number: int) -> NDArray[np.uint8]:
        content = self.cache.get(self._digest(shard, number), partial(self._fetch, shard, number))
        return np.frombuffer(content, np.uint8)

    def _digest(self, shard: int, number: int) -> bytes:
        assert self.index.block_digests is not None
        return self.index.block_digests[self._first_block[shard] + number].tobytes()

    def _fetch(self, shard: int, number: int) -> bytes:
        file, start = self.index.shards[shard], number * BLOCK_BYTES
        size = min(BLOCK_BYTES, file.bytes - start)  # the last block of a file may be shorter
        return self.files.part(file.name, start, size, self._digest(shard, number))
