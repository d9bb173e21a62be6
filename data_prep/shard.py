"""Documents to token shards: `BOS tokens EOS` of each in a webdataset tar, and the index beside them."""

import fcntl
import os
import re
import shutil
import socket
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from data_prep.documents import Document, DocumentReader, Place, Reject, find_inputs, fingerprint_inputs
from data_prep.parallel import ordered_map, progress_bar
from data_prep.tasks import Parts, changed_options
from data_prep.tokenizer import Tokenizer, load_tokenizer
from data_prep.writing import Made, Tokens, replace_directory, write_datasets
from infini_train.data.index import INDEX_JSON, DatasetIndex

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
    task: tuple[int, int] | None = None,
) -> None:
    """Tokenise all documents of `inputs` into the dataset `output`, or `output`/train and `output`/valid.

    A document goes to valid if the hash of its id falls below `validation_fraction`; if none does, the one
    with the lowest hash goes. What was left out stands in rejects.jsonl. The bytes written depend on inputs
    and options alone, not on `workers`. `output` appears when everything is on disk, not before; a second
    run with the same options leaves it as it is.

    `task` (2, 4), say, does only what falls to the third of four tasks, and keeps it beside `output`. They may run
    on any nodes that share a file system, in any order or at once. One that is done is not done again; whichever
    finds all done makes `output` of their parts, byte for byte what a run without tasks makes.

    Raises ValueError for an empty corpus, for options out of range, and if `output` holds anything else or other
    options left unfinished tasks.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, not {validation_fraction}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, not {shard_tokens}")
    if task and not 0 <= task[0] < task[1]:
        raise ValueError(f"task must be at least 0 and below tasks, not {task[0]} of {task[1]}")
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
    parts = Parts(output, options | special, task[1], overwrite) if task else None

    def finished() -> bool:
        return is_finished(output, options | special, overwrite)

    def write(root: Path, items: Iterable[Tokens | Reject]) -> Made:
        return write_datasets(root, items, tokenizer, options, inputs)

    if finished():
        print(f"{output} is there already, made with the same options: nothing to do")
        if parts:
            parts.remove()  # whoever made it may have been killed before that
        return
    reader = DocumentReader(files, text_field, id_field, *task or (0, 1))
    with closing(_tokenised(reader, tokenizer, workers)) as items:
        if parts and task:
            made = _do_task(parts, task[0], items, finished, write)
            if made is None:
                return
        else:
            with staging_of(output) as staging:
                made = write(staging, (item for _, item in items))
    for name, index in made.indexes.items():
        print(
            f"{output / name}: {index.documents:,} documents, {index.total_tokens:,} tokens, "
            f"{len(index.shards)} shards"
        )
    rejects = output / "rejects.jsonl"
    print(f"left out: {made.left_out}; see {rejects}" if made.left_out else "no document left out")


def _do_task(
    parts: Parts,
    task: int,
    items: Iterable[tuple[Place, Tokens | Reject]],
    finished: Callable[[], bool],
    write: Callable[[Path, Iterable[Tokens | Reject]], Made],
) -> Made | None:
    """Make `items` the part of `task`, if it is not there; join the parts, if all are. None if others do that."""
    try:
        parts.open()
        if finished():  # others joined and removed the parts before there was this directory
            raise FileNotFoundError
        done_before = task not in parts.missing()
        if not done_before:
            parts.write(task, items)
        already = " already" if done_before else ""
        print(f"task {task} of {len(parts.paths)} is done{already}, on {socket.gethostname()}")
        if missing := parts.missing():
            which = ", ".join(map(str, missing[:10])) + ", ..." * (len(missing) > 10)
            print(f"tasks not done yet: {len(missing)} ({which})")
            return None
        with parts.joining() as joined:
            if joined is None:
                print("another task is joining the parts")
                return None
            return write(joined, parts.items())
    except FileNotFoundError:
        if not finished():
            raise
        parts.remove()
        print(f"another task has made {parts.output}")
        return None


def _tokenised(
    reader: DocumentReader, tokenizer: Tokenizer, workers: int
) -> Generator[tuple[Place, Tokens | Reject], None, None]:
    tokens = 0
    with progress_bar() as progress:
        bar = progress.add_task("tokenising", total=reader.bytes_total, note="")
        for items in ordered_map(_tokenise, _batches(reader), workers, _initialise, (tokenizer,)):
            yield from items
            tokens += sum(item.count for _, item in items if isinstance(item, Tokens))
            progress.update(bar, completed=reader.bytes_read, note=f"{tokens:,} tokens")
        progress.update(bar, completed=reader.bytes_total)


_tokenizer: Tokenizer  # of this worker process


def _initialise(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer


def _tokenise(items: list[tuple[Place, Document | Reject]]) -> list[tuple[Place, Tokens | Reject]]:
    results: list[tuple[Place, Tokens | Reject]] = []
    for place, item in items:
        if isinstance(item, Document):
            tokens = _tokenizer.encode(item.text)
            results.append((place, Tokens(item.id, item.source, tokens.tobytes(), len(tokens))))
        else:
            results.append((place, item))
    return results


def _batches(reader: DocumentReader) -> Iterator[list[tuple[Place, Document | Reject]]]:
    batch: list[tuple[Place, Document | Reject]] = []
    size = 0
    for place, item in reader.placed():
        batch.append((place, item))
        size += len(item.text) if isinstance(item, Document) else 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def is_finished(output: Path, options: dict[str, Any], overwrite: bool) -> bool:
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
    if other := changed_options(made_with, options):
        state = f"was made with other options ({other})"
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
def staging_of(output: Path) -> Iterator[Path]:
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
            replace_directory(output, staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(lock)
