"""Documents to token shards: `BOS tokens EOS` of each in a webdataset tar, and the index beside them."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from data_prep.documents import Document, DocumentReader, Reject, find_inputs, fingerprint_inputs
from data_prep.indexing import build_index
from data_prep.parallel import ordered_map, progress_bar
from data_prep.tokenizer import Tokenizer, load_tokenizer
from infini_train.data.index import INDEX_JSON, DatasetIndex, atomic_file

OUR_FILES = re.compile(
    r"index\.json|index\.npz|rejects\.jsonl|tokenizer\.model|tokenizer\.json|tokenizer_config\.json|shard-\d+\.tar"
)
BATCH_CHARACTERS = 1_000_000  # a worker's job: enough to make the way there and back cheap


def shard_corpus(
    inputs: list[Path],
    output: Path,
    tokenizer_path: Path,
    validation_fraction: float = 0.0,
    shard_tokens: int = 50_000_000,
    text_field: str = "text",
    id_field: str = "id",
    workers: int = 1,
    overwrite: bool = False,
) -> None:
    """Tokenise all documents of `inputs` into the dataset `output`, or `output`/train and `output`/valid.

    A document goes to valid if the hash of its id falls below `validation_fraction`; if none does, the one
    with the lowest hash goes. What was left out stands in rejects.jsonl. The bytes written depend on inputs
    and options alone, not on `workers`. `output` appears when everything is on disk, not before; a second
    run with the same options leaves it as it is.

    Raises ValueError for an empty corpus, for options out of range, and if `output` holds anything else.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, not {validation_fraction}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, not {shard_tokens}")
    tokenizer = load_tokenizer(tokenizer_path)
    files = find_inputs(inputs, output)
    options = {
        "inputs": fingerprint_inputs(files),
        "tokenizer_sha256": tokenizer.sha256,
        "validation_fraction": validation_fraction,
        "shard_tokens": shard_tokens,
        "text_field": text_field,
        "id_field": id_field,
    }
    special = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}  # tokenizer.json itself does not say which
    if _finished(output, options | special, overwrite):
        print(f"{output} is there already, made with the same options: nothing to do")
        return

    with _staging(output) as staging:
        reader = DocumentReader(files, text_field, id_field)
        names = ["train", "valid"] if validation_fraction else ["."]
        writers = [ShardWriter(staging / name, shard_tokens, tokenizer) for name in names]
        split = Split(validation_fraction)
        rejects: Counter[str] = Counter()
        with progress_bar() as progress, atomic_file(staging / "rejects.jsonl") as rejects_file:
            task = progress.add_task("tokenising", total=reader.bytes_total, note="")
            for items in ordered_map(_tokenise, _batches(reader), workers, _initialise, (tokenizer,)):
                for item in items:
                    if isinstance(item, Reject):
                        rejects[item.reason] += 1
                        rejects_file.write(json.dumps(asdict(item)).encode() + b"\n")
                    else:
                        for ready, part in split.add(item):
                            writers[part].add(ready)
                tokens = sum(writer.total_tokens for writer in writers)
                progress.update(task, completed=reader.bytes_read, note=f"{tokens:,} tokens")
            for ready, part in split.finish():
                writers[part].add(ready)
            progress.update(task, completed=reader.bytes_total)
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(rejects.items()))
        documents = sum(writer.total_documents for writer in writers)
        if documents < len(writers):
            what = "no document" if not documents else "a single document, too few to split,"
            because = f" ({left_out} left out)" if left_out else ""
            raise ValueError(f"{what} in {', '.join(map(str, inputs))}{because}")
        indexes = [writer.close(options) for writer in writers]

    for index, name in zip(indexes, names, strict=True):
        print(
            f"{output / name}: {index.documents:,} documents, {index.total_tokens:,} tokens, "
            f"{len(index.shards)} shards"
        )
    print(f"left out: {left_out}; see {output / 'rejects.jsonl'}" if left_out else "no document left out")


@dataclass(frozen=True)
class Tokens:
    """A tokenised document: `data` is `BOS tokens EOS`, little-endian."""

    id: str
    source: str
    data: bytes
    count: int


class Split:
    """Deals documents to part 0 (train) or 1 (valid) by the hash of their ids.

    Holds back the document of lowest hash until another goes to valid, so that valid gets at least one.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.held: tuple[float, Tokens] | None = None
        self.to_valid = 0

    def add(self, document: Tokens) -> Iterator[tuple[Tokens, int]]:
        rank = int.from_bytes(hashlib.sha256(document.id.encode(errors="surrogatepass")).digest()[:8]) / 2**64
        if rank < self.fraction:
            self.to_valid += 1
            yield document, 1
        elif self.fraction and not self.to_valid and (self.held is None or rank < self.held[0]):
            if self.held:
                yield self.held[1], 0
            self.held = rank, document
        else:
            yield document, 0

    def finish(self) -> Iterator[tuple[Tokens, int]]:
        if self.held:
            yield self.held[1], 0 if self.to_valid else 1


class ShardWriter:
    """Writes documents into shards of about `shard_tokens` tokens; a document is never cut."""

    def __init__(self, root: Path, shard_tokens: int, tokenizer: Tokenizer) -> None:
        self.root = root
        self.shard_tokens = shard_tokens
        self.tokenizer = tokenizer
        self.total_documents = self.total_tokens = 0
        self._shards: list[str] = []
        self._open: list[tuple[int, Tokens]] = []  # what the next shard will hold, with its number
        self._open_tokens = 0
        root.mkdir(parents=True, exist_ok=True)

    def add(self, document: Tokens) -> None:
        if self._open and self._open_tokens + document.count > self.shard_tokens:
            self._write_shard()
        self._open.append((self.total_documents, document))
        self._open_tokens += document.count
        self.total_documents += 1
        self.total_tokens += document.count

    def close(self, options: dict[str, Any]) -> DatasetIndex:
        self._write_shard()
        for name, content in self.tokenizer.files.items():
            with atomic_file(self.root / name) as f:
                f.write(content)
        index = build_index(self.root, self._shards, self.tokenizer, options)
        index.save()
        return index

    def _write_shard(self) -> None:
        name = f"shard-{len(self._shards):05d}.tar"
        with (
            atomic_file(self.root / name) as f,
            TarWriter(f, encoder=False, mtime=0, user="", group="") as tar,
        ):
            for number, document in self._open:
                about = {
                    "id": document.id,
                    "source": document.source,
                    "tokens": document.count,
                    "tokenizer_sha256": self.tokenizer.sha256,
                }
                tar.write(
                    {
                        "__key__": f"{number:09d}",
                        "json": json.dumps(about).encode(),
                        "tokens.bin": document.data,
                    }
                )
        self._shards.append(name)
        self._open, self._open_tokens = [], 0


_tokenizer: Tokenizer  # of this worker process


def _initialise(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer


def _tokenise(items: list[Document | Reject]) -> list[Tokens | Reject]:
    results: list[Tokens | Reject] = []
    for item in items:
        if isinstance(item, Document):
            tokens = _tokenizer.encode(item.text)
            results.append(Tokens(item.id, item.source, tokens.tobytes(), len(tokens)))
        else:
            results.append(item)
    return results


def _batches(reader: DocumentReader) -> Iterator[list[Document | Reject]]:
    batch: list[Document | Reject] = []
    size = 0
    for item in reader:
        batch.append(item)
        size += len(item.text) if isinstance(item, Document) else 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _finished(output: Path, options: dict[str, Any], overwrite: bool) -> bool:
    """Whether `output` is what this run would make. Raises ValueError if it is something not to be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    parts = [part for part in (output, output / "train", output / "valid") if (part / INDEX_JSON).is_file()]
    indexes = [DatasetIndex.load(part) for part in parts]
    strange = [path for path in output.rglob("*") if path.is_file() and not OUR_FILES.fullmatch(path.name)]
    if strange or not all(index.options for index in indexes) or not indexes:
        because = f", it holds {strange[0]}" if strange else ""
        raise ValueError(f"{output} exists and is no dataset of ours{because}: give another --out, or remove it")
    made_with = indexes[0].options | {"bos_id": indexes[0].bos_id, "eos_id": indexes[0].eos_id}
    other = sorted(key for key in {*options, *made_with} if options.get(key) != made_with.get(key))
    if other:
        state = f"was made with other options ({', '.join(other)})"
    elif len(parts) != (2 if options["validation_fraction"] else 1):
        state = "has lost its train or valid part"
    else:
        try:
            for index in indexes:
                index.check_files()
            return True
        except (OSError, ValueError) as error:
            state = f"is damaged ({error})"
    if overwrite:
        return False
    raise ValueError(f"{output} exists and {state}: give --overwrite to replace it")


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A directory beside `output` that takes its place, with all it holds, when the block ends well.

    Raises ValueError if another run is writing there.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.partial")
    staging.mkdir(exist_ok=True)
    lock = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {output}") from None
        try:
            for left_over in staging.iterdir():  # of a run that was killed
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            yield staging
            if output.exists():
                replaced = output.with_name(f".{output.name}.replaced")
                shutil.rmtree(replaced, ignore_errors=True)
                output.rename(replaced)
                staging.rename(output)
                shutil.rmtree(replaced)
            else:
                staging.rename(output)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(lock)
