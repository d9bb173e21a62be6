"""Small datasets for tests: random tokens in real shards."""

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import webdataset as wds

from infini_train.data.index import DatasetIndex, Shard
from infini_train.files import sha256_of_file

BOS, EOS = 1, 2


def make_dataset(
    root: Path, lengths: list[int], *, vocab_size: int = 100, per_shard: int = 3, seed: int = 0
) -> list[np.ndarray]:
    """Writes a dataset of documents with these token counts (BOS and EOS included) and returns the tokens of each."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    dtype = np.dtype("<u2" if vocab_size <= 65_536 else "<u4")
    documents = [np.array([BOS, *rng.integers(3, vocab_size, n - 2), EOS], dtype=dtype) for n in lengths]
    (root / "tokenizer.model").write_bytes(b"no real tokenizer")
    tokenizer_sha256 = hashlib.sha256(b"no real tokenizer").hexdigest()
    shards, shard_D, offset_D = [], [], []
    for first in range(0, len(documents), per_shard):
        path = root / f"shard-{len(shards):05d}.tar"
        with open(path, "wb") as f, wds.TarWriter(f, encoder=False) as tar:
            for doc in range(first, min(first + per_shard, len(documents))):
                about = {"id": str(doc), "source": "synthetic", "tokens": lengths[doc]}
                tar.write(
                    {
                        "__key__": f"{doc:08d}",
                        "tokens.bin": documents[doc].tobytes(),
                        "json": json.dumps({**about, "tokenizer_sha256": tokenizer_sha256}).encode(),
                    }
                )
        shards.append(path)
    for number, path in enumerate(shards):
        for member in _members(path):
            shard_D.append(number)
            offset_D.append(member)
    DatasetIndex(
        root=root,
        tokenizer_file="tokenizer.model",
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=vocab_size,
        bos_id=BOS,
        eos_id=EOS,
        dtype=dtype.type,
        shards=[
            Shard(
                name=path.name,
                bytes=path.stat().st_size,
                sha256=sha256_of_file(path),
                documents=shard_D.count(number),
                tokens=sum(n for n, shard in zip(lengths, shard_D, strict=True) if shard == number),
            )
            for number, path in enumerate(shards)
        ],
        shard_D=np.array(shard_D, dtype=np.int32),
        offset_D=np.array(offset_D, dtype=np.int64),
        tokens_D=np.array(lengths, dtype=np.int64),
    ).save()
    return documents


def _members(path: Path) -> list[int]:
    """Byte offsets of the token members of a shard."""
    with tarfile.open(path) as tar:
        return [member.offset_data for member in tar if member.name.endswith(".tokens.bin")]
