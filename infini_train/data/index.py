"""The index of a sharded dataset: where every document's tokens are, and how they were made.

A dataset is a directory (docs/architecture.md, Data) with tar shards, the tokenizer, `index.npz` (one entry for each
document) and `index.json`. The latter is written last, so a directory without it is not a dataset.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from infini_train.files import DIGEST_BYTES, atomic_file, digest_of, plain_name, sha256_of_file

VERSION = 1
INDEX_JSON, INDEX_NPZ = "index.json", "index.npz"
# Field of index.json with the sha256 of the file itself, in which NO_DIGEST stands for this digest.
DIGEST, NO_DIGEST = "index_json_sha256", "0" * 64
FIELDS = {
    *("version", "tokenizer", "vocab_size", "bos_id", "eos_id", "dtype", "documents", "tokens", "fingerprint"),
    *("index_npz", "index_npz_sha256", "options", "shards", DIGEST),
}
DTYPES: dict[str, type[np.unsignedinteger]] = {"uint16": np.uint16, "uint32": np.uint32}  # little-endian on disk
SPECIAL_TOKENS = 2  # every document is stored as BOS tokens EOS
BLOCK_BYTES = 1 << 20  # unit in which a remote shard is fetched and checked


def block_digests(path: Path) -> np.ndarray:
    """Return the digests of a file's blocks, uint8 [blocks, DIGEST_BYTES]; the last block may be shorter."""
    with open(path, "rb") as f:
        digests = [digest_of(block) for block in iter(lambda: f.read(BLOCK_BYTES), b"")]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)


def check_names(document: dict[str, Any]) -> None:
    """Check the file names in the content of an index.json, before any of these files is fetched or opened.

    Raises:
        ValueError: a file is not directly in the dataset's directory.
        KeyError, TypeError: a field is missing or of another type.
    """
    plain_name(document.get("index_npz", INDEX_NPZ), "index_npz")
    plain_name(document["tokenizer"]["file"], "tokenizer.file")
    for number, shard in enumerate(document["shards"]):
        plain_name(shard["name"], f"shards[{number}].name")


@dataclass(frozen=True)
class Shard:
    """One tar file of a dataset; `name` is relative to the dataset's directory."""

    name: str
    bytes: int
    sha256: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Remote:
    """Location of a remote dataset's shards, and the local cache for their blocks (see remote.py)."""

    url: str
    cache: str
    cache_bytes: int


@dataclass(eq=False)
class DatasetIndex:
    """Locations and token counts of all D documents, in shard order.

    The tokens of document d are
    `np.fromfile(root / shards[shard_D[d]].name, dtype, tokens_D[d], offset=offset_D[d])`.

    Attributes:
        root: the dataset's directory, or its copy in the cache if the dataset is remote.
        tokenizer_file, tokenizer_sha256: the tokenizer that made the tokens; its file is in `root`.
        vocab_size, bos_id, eos_id: of that tokenizer.
        dtype: type of a token on disk, little-endian.
        shards: the tar files.
        shard_D: int32 [D], the number of each document's shard.
        offset_D: int64 [D], the byte offset of its tokens in that tar file.
        tokens_D: int64 [D], the number of its tokens, BOS and EOS included.
        options: the options that `infini-train prep` was run with; they are for information and not part of the data.
        block_digests: uint8 [blocks of all shards, 16]; None in an index that was made without digests.
        remote: where the shards are, if they are not in `root`.
        sealed: whether index.json held a digest of itself when it was loaded; indexes of earlier versions do not.
    """

    root: Path
    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    dtype: type[np.unsignedinteger]
    shards: list[Shard]
    shard_D: np.ndarray
    offset_D: np.ndarray
    tokens_D: np.ndarray
    options: dict[str, Any] = field(default_factory=dict)
    block_digests: np.ndarray | None = None
    remote: Remote | None = None
    sealed: bool = True

    @property
    def documents(self) -> int:
        return len(self.tokens_D)

    @property
    def total_tokens(self) -> int:
        return int(self.tokens_D.sum())

    @property
    def size(self) -> str:
        """Numbers of documents, tokens and shards in words, as commands print them."""
        counts = {"document": self.documents, "token": self.total_tokens, "shard": len(self.shards)}
        return ", ".join(f"{count:,} {noun}{'' if count == 1 else 's'}" for noun, count in counts.items())

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over everything that determines batches: token counts, locations, shard contents, tokenizer."""
        digest = hashlib.sha256()
        head = [VERSION, self.tokenizer_sha256, np.dtype(self.dtype).name, [s.sha256 for s in self.shards]]
        digest.update(json.dumps(head).encode())
        for array, dtype in ((self.shard_D, "<i4"), (self.offset_D, "<i8"), (self.tokens_D, "<i8")):
            digest.update(array.astype(dtype).tobytes())
        return digest.hexdigest()

    @property
    def earlier(self) -> dict[str, int]:
        """Fingerprint -> number of documents, for every state before `infini-train prep append` added documents."""
        found = {}
        for appended in self.options.get("appended", []):
            shards, documents = appended["shards"], appended["documents"]
            arrays = {name: getattr(self, name)[:documents] for name in ("shard_D", "offset_D", "tokens_D")}
            found[replace(self, shards=self.shards[:shards], **arrays).fingerprint] = documents
        return found

    @classmethod
    def concatenated(cls, root: Path, indexes: "Sequence[DatasetIndex]") -> "DatasetIndex":
        """Return one index of the shards of all `indexes`, in that order, in `root`; its options are the first's."""
        first = indexes[0]
        numbers = np.cumsum([0, *(len(index.shards) for index in indexes)])
        digests = [index.block_digests for index in indexes]
        return replace(
            first,
            root=root,
            shards=[shard for index in indexes for shard in index.shards],
            shard_D=np.concatenate([index.shard_D + n for index, n in zip(indexes, numbers, strict=False)]),
            offset_D=np.concatenate([index.offset_D for index in indexes]),
            tokens_D=np.concatenate([index.tokens_D for index in indexes]),
            block_digests=None if any(x is None for x in digests) else np.concatenate(digests),  # type: ignore[arg-type]
        )

    def save(self) -> None:
        """Write the arrays and then index.json, which names their file and holds its checksum, into `root`.

        If this replaces an older index, the arrays get another file name, so that the directory holds a complete
        index at any instant.
        """
        self._check(self.root / INDEX_JSON)
        npz = INDEX_NPZ
        if (self.root / INDEX_JSON).exists():
            npz = f"index-{self.fingerprint[:12]}.npz"
        with atomic_file(self.root / npz) as f:
            arrays = {
                "shard": self.shard_D.astype("<i4"),
                "offset": self.offset_D.astype("<i8"),
                "tokens": self.tokens_D.astype("<i8"),
            }
            if self.block_digests is not None:
                arrays["blocks"] = self.block_digests
            np.savez(f, **arrays)  # type: ignore[arg-type]  # mypy takes them for allow_pickle
        document = {
            "version": VERSION,
            "tokenizer": {"file": self.tokenizer_file, "sha256": self.tokenizer_sha256},
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "dtype": np.dtype(self.dtype).name,
            "documents": self.documents,
            "tokens": self.total_tokens,
            "fingerprint": self.fingerprint,
            "index_npz": npz,
            "index_npz_sha256": sha256_of_file(self.root / npz),
            "options": self.options,
            "shards": [asdict(shard) for shard in self.shards],
            DIGEST: NO_DIGEST,
        }
        content = json.dumps(document, indent=1).encode() + b"\n"
        with atomic_file(self.root / INDEX_JSON) as f:
            f.write(content.replace(NO_DIGEST.encode(), hashlib.sha256(content).hexdigest().encode()))
        self.remove_older_arrays()

    def remove_older_arrays(self) -> None:
        """Remove the arrays of an index that this one has replaced."""
        used = json.loads((self.root / INDEX_JSON).read_bytes()).get("index_npz", INDEX_NPZ)
        for path in self.root.glob("index*.npz"):
            if path.name != used:
                path.unlink()

    @classmethod
    def load(cls, directory: str | Path) -> "DatasetIndex":
        """Read and check the index of the dataset in `directory`, without opening its shards.

        Raises:
            FileNotFoundError: there is no index.
            ValueError: the index is damaged or of another version.
        """
        root = Path(directory)
        path = root / INDEX_JSON
        if not path.is_file():
            if parts := sorted(str(part.parent) for part in root.glob(f"*/{INDEX_JSON}")):
                raise FileNotFoundError(
                    f"{root}: found no {INDEX_JSON}, expected a dataset, such as {', '.join(parts)}"
                )
            found = INDEX_JSON if root.is_dir() else "directory"
            raise FileNotFoundError(
                f"{root}: found no {found}, expected a dataset that `infini-train prep` has made to its end"
            )
        try:
            content = path.read_bytes()
            document = json.loads(content)
            version = document["version"]
            if version != VERSION:
                raise ValueError(f"version: found {version!r}, expected {VERSION}")
            if document["dtype"] not in DTYPES:
                raise ValueError(f"dtype: found {document['dtype']!r}, expected one of {sorted(DTYPES)}")
            check_names(document)
            types: dict[str, Any] = {f.name: f.type for f in fields(Shard)}
            numbers = dict.fromkeys(("vocab_size", "bos_id", "eos_id"), int)
            for values, expected in ((document, numbers), *((shard, types) for shard in document["shards"])):
                for name, kind in expected.items():
                    if not isinstance(values[name], kind):
                        raise TypeError(f"{name}: found {values[name]!r}, expected {kind.__name__}")
            shards = [Shard(**{name: shard[name] for name in types}) for shard in document["shards"]]
            npz = root / document.get("index_npz", INDEX_NPZ)
            if not npz.is_file():
                raise ValueError(f"index_npz: found no file {npz}, expected the arrays of this index")
            if (found := sha256_of_file(npz)) != document["index_npz_sha256"]:
                raise ValueError(
                    f"index_npz_sha256: found {found[:12]}... of {npz}, expected "
                    f"{str(document['index_npz_sha256'])[:12]}...: the file is damaged or of another run"
                )
            with np.load(npz, allow_pickle=False) as arrays:
                index = cls(
                    root=root,
                    tokenizer_file=document["tokenizer"]["file"],
                    tokenizer_sha256=document["tokenizer"]["sha256"],
                    vocab_size=document["vocab_size"],
                    bos_id=document["bos_id"],
                    eos_id=document["eos_id"],
                    dtype=DTYPES[document["dtype"]],
                    shards=shards,
                    shard_D=arrays["shard"].astype(np.int32, copy=False),
                    offset_D=arrays["offset"].astype(np.int64, copy=False),
                    tokens_D=arrays["tokens"].astype(np.int64, copy=False),
                    options=document["options"],
                    block_digests=arrays.get("blocks"),
                    sealed=DIGEST in document,
                )
        except KeyError as error:
            raise ValueError(f"{path}: found no field {error}, expected every field of an index") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None
        index._check(path)
        if unknown := set(document) - FIELDS:
            raise ValueError(
                f"{path}: found fields {sorted(unknown)}, expected only those of an index: it was changed"
            )
        if index.sealed:
            unsealed = content.replace(str(document[DIGEST]).encode(), NO_DIGEST.encode())
            if (found := hashlib.sha256(unsealed).hexdigest()) != document[DIGEST]:
                raise ValueError(
                    f"{path}: found sha256 {found[:12]}..., expected {str(document[DIGEST])[:12]}... by its own "
                    "record: it was changed; `infini-train prep index --overwrite` makes a new one"
                )
        elif (document["documents"], document["tokens"]) != (index.documents, index.total_tokens):
            raise ValueError(
                f"{path}: found {index.documents} documents and {index.total_tokens} tokens in {npz.name}, expected "
                f"{document['documents']} and {document['tokens']}"
            )
        return index

    def check_files(self) -> None:
        """Check that the files beside the index are those that it describes, without reading any shard.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a shard has another size, or the tokenizer is not the one that made the tokens.
        """
        tokenizer = self.root / self.tokenizer_file
        if not tokenizer.is_file():
            raise FileNotFoundError(f"{tokenizer}: found no file, expected the tokenizer that {INDEX_JSON} lists")
        if not self.remote:  # each block of a remote shard is checked when it is read
            for shard in self.shards:
                self.checked_path(shard)
        found = sha256_of_file(tokenizer)
        if found != self.tokenizer_sha256:
            raise ValueError(
                f"{tokenizer}: found sha256 {found[:12]}..., expected {self.tokenizer_sha256[:12]}..., that of the "
                "tokenizer that made the tokens"
            )

    def checked_path(self, shard: Shard) -> Path:
        """Return the path of a shard in `root`, after a check that the file exists and has the size in the index.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: it has another size.
        """
        path = self.root / shard.name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: found no file, expected the shard that {INDEX_JSON} lists")
        if (found := path.stat().st_size) != shard.bytes:
            raise ValueError(
                f"{path}: found {found:,} bytes, expected {shard.bytes:,} by {INDEX_JSON}: truncated or replaced"
            )
        return path

    def _check(self, path: Path) -> None:
        """Raise ValueError if the parts of the index contradict one another; `path` is named in the message."""
        lengths = {len(self.shard_D), len(self.offset_D), len(self.tokens_D)}
        if len(lengths) != 1:
            raise ValueError(f"{path}: found arrays of lengths {sorted(lengths)} in {INDEX_NPZ}, expected one length")
        if not self.shards or not self.documents:
            raise ValueError(f"{path}: found no documents, expected at least one")
        outside_D = (self.shard_D < 0) | (self.shard_D >= len(self.shards))
        if outside_D.any():
            worst = int(outside_D.argmax())
            raise ValueError(
                f"{path}: document {worst}: found shard {self.shard_D[worst]}, expected 0 to {len(self.shards) - 1}"
            )
        if self.tokens_D.min() < SPECIAL_TOKENS:
            worst = int(self.tokens_D.argmin())
            raise ValueError(
                f"{path}: document {worst}: found {self.tokens_D[worst]} tokens, expected at least {SPECIAL_TOKENS}, "
                "BOS and EOS"
            )
        if not (0 <= self.bos_id < self.vocab_size and 0 <= self.eos_id < self.vocab_size):
            raise ValueError(
                f"{path}: bos_id, eos_id: found {self.bos_id} and {self.eos_id}, expected 0 to "
                f"{self.vocab_size - 1}, ids in the vocabulary"
            )
        if self.vocab_size > (most := np.iinfo(self.dtype).max + 1):
            raise ValueError(
                f"{path}: vocab_size: found {self.vocab_size}, expected at most {most} in {np.dtype(self.dtype).name}"
            )
        end_D = self.offset_D + self.tokens_D * np.dtype(self.dtype).itemsize
        size_D = np.array([shard.bytes for shard in self.shards], np.int64)[self.shard_D]
        outside_D = (self.offset_D < 0) | (end_D > size_D)
        if outside_D.any():
            worst = int(outside_D.argmax())
            raise ValueError(
                f"{path}: document {worst}: found bytes {self.offset_D[worst]} to {end_D[worst]}, expected bytes "
                f"from 0 to {size_D[worst]}, those of its shard"
            )
        blocks = sum(-(-shard.bytes // BLOCK_BYTES) for shard in self.shards)
        if self.block_digests is not None and self.block_digests.shape != (blocks, DIGEST_BYTES):
            found, expected = self.block_digests.shape, (blocks, DIGEST_BYTES)
            raise ValueError(f"{path}: digests of blocks: found shape {found}, expected {expected}")
        documents = np.bincount(self.shard_D, minlength=len(self.shards))
        tokens = np.zeros(len(self.shards), np.int64)
        np.add.at(tokens, self.shard_D, self.tokens_D)
        for shard, found_documents, found_tokens in zip(self.shards, documents, tokens, strict=True):
            if (shard.documents, shard.tokens) != (found_documents, found_tokens):
                raise ValueError(
                    f"{path}: shard {shard.name}: found {found_documents} documents and {found_tokens} tokens in "
                    f"{INDEX_NPZ}, expected {shard.documents} and {shard.tokens}"
                )
