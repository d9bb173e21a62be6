"""The working directory of a preparation: `.OUT.work-KEY` beside the output, where KEY is a hash of all options.

options.json, inputs.jsonl   the options and the input files
parts/part-NNNNN.jsonl       what task NNNNN has read: the header of each document, and each reject (item_files.py)
parts/part-NNNNN.tokens      tokens of these documents, one `BOS tokens EOS` after the other
parts/part-NNNNN.bands       bands of their signatures, if near-duplicates are left out (near_duplicates.py)
parts/part-NNNNN.json        counts of what it has read, by kind (summary.py)
plan/                        the documents of each shard, and the tokens of seams (planning.py)
made/                        the datasets, which move to OUT when they are complete
indexes/                     an index of each shard
logs/                        datatrove's files by stage: markers of finished tasks, logs, statistics

All files appear complete or not at all. Tasks find each other's results by file name alone, so they can run on any
node of a common file system.
"""

import glob
import hashlib
import heapq
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.documents import Document, DocumentPosition, Reject
from data_prep.input_files import InputFile, inputs_to_json, load_inputs
from data_prep.item_files import ItemWriter, read_items
from data_prep.summary import Summary
from data_prep.texts import BadText
from data_prep.tokenising import Ends, TokenisedText
from infini_train.files import atomic_file, directory_lock

OPTIONS, INPUTS, SUMMARY = "options.json", "inputs.jsonl", "summary.json"
BANDS = "bands"  # kind of the files of parts that hold bands of signatures
FORMAT = 5  # of the files of parts and plans; work of another format is not continued


class DocumentHeader(NamedTuple):
    """What planning needs to know of a tokenised document."""

    id: str
    source: str
    digest: str  # of the text, hexadecimal (files.digest_of)
    group: str | None
    part: int  # number of the part that holds the tokens
    offset: int  # of the tokens in the part's file, in bytes
    tokens: int
    ends: Ends | None  # if the document may be joined with others
    heading: str = ""


class Work:
    """The working directory of one preparation.

    Args:
        output: the dataset directory to make.
        options: everything that may change the output, as plain JSON.
        tasks: number of tasks that read the inputs.
    """

    def __init__(self, output: Path, options: dict[str, Any], tasks: int):
        self.output, self.options, self.tasks = output.resolve(), options, tasks
        self._identity = options | {"tasks": tasks, "format of the work": FORMAT}
        content = json.dumps(self._identity, sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.directory = self.output.with_name(f".{self.output.name}.work-{key}")

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def plan(self) -> Path:
        return self.directory / "plan"

    @property
    def made(self) -> Path:
        return self.directory / "made"

    def index_of(self, shard: str) -> Path:
        """Return the directory of a shard's index."""
        return self.directory / "indexes" / shard

    def part(self, task: int, kind: str) -> Path:
        """Return a file of a task's part; `kind` is "jsonl", "tokens", "bands" or "json"."""
        return self.directory / "parts" / f"part-{task:05d}.{kind}"

    def open(self, files: list[InputFile], overwrite: bool) -> None:
        """Create the directory, or continue in it if it exists.

        Args:
            files: all files of the corpus.
            overwrite: discard unfinished work of other options.

        Raises:
            ValueError: there is unfinished work of other options, and `overwrite` is false.
        """
        for other in self._beside("work-*"):
            if other == self.directory or not (other / OPTIONS).exists():  # logs of finished work, or just begun
                continue
            if not overwrite:
                options = json.loads((other / OPTIONS).read_bytes())
                raise ValueError(
                    f"{other} holds unfinished work, made with other options "
                    f"({changed_options(options, self._identity)}): "
                    "give those to finish it, or --overwrite to discard it"
                )
            self._remove(other)
        for name in ("parts", "made", "indexes"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        if not (self.directory / OPTIONS).exists():
            with atomic_file(self.directory / INPUTS) as f:
                f.write(inputs_to_json(files))
            with atomic_file(self.directory / OPTIONS) as f:
                f.write(json.dumps(self._identity, indent=1).encode() + b"\n")

    def inputs(self) -> list[InputFile]:
        """Read the list of all files of the corpus."""
        return load_inputs(self.directory / INPUTS)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the working directory. Raises ValueError if another run on this machine uses it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with directory_lock(self.directory, self.output):
                yield
        finally:
            with suppress(OSError):  # it is not empty, or was removed
                self.directory.rmdir()

    def write_part(
        self, task: int, items: Iterable[tuple[DocumentPosition, Reject | tuple[Document, TokenisedText]]]
    ) -> Counter[str]:
        """Write the part of a task.

        Args:
            task: number of the task.
            items: documents and rejects with their positions, which ascend.

        Returns:
            The numbers of tokens and, by reason, of documents that are left out.
        """
        counts: Counter[str] = Counter()
        offset = 0
        with ExitStack() as stack:
            headers, tokens_file, bands = (
                stack.enter_context(atomic_file(self.part(task, kind))) for kind in ("jsonl", "tokens", BANDS)
            )
            part = ItemWriter(headers)
            for position, item in items:
                if not isinstance(item, Reject):
                    document, text = item
                    start, count = offset, 0
                    try:
                        for tokens in text:
                            offset += tokens_file.write(tokens.tobytes())
                            count += len(tokens)
                    except BadText as error:  # a fault within a long text, of which nothing is kept
                        offset = tokens_file.seek(start)
                        tokens_file.truncate()
                        item = Reject(document.id, document.source, error.reason, error.detail)
                if isinstance(item, Reject):
                    counts[f"left out: {item.reason}"] += 1
                    about: dict[str, str] | DocumentHeader = vars(item)
                else:
                    counts["tokens"] += count
                    bands.write(document.bands)
                    about = DocumentHeader(
                        document.id,
                        document.source,
                        text.digest,
                        document.group,
                        task,
                        start,
                        count,
                        text.ends,
                        document.heading,
                    )
                part.add((position, about))
            part.close()
        return counts

    def write_summary(self, task: int, summary: Summary) -> None:
        """Write the counts of a task."""
        with atomic_file(self.part(task, "json")) as f:
            f.write(json.dumps(summary.to_json()).encode() + b"\n")

    def summary(self) -> Summary:
        """Return the counts of all tasks, which have read their inputs, and of the plan, if it is made."""
        paths = [self.part(task, "json") for task in range(self.tasks)]
        planned = [path for path in [self.plan / SUMMARY] if path.exists()]
        return Summary.from_json(json.loads(path.read_bytes()) for path in paths + planned)

    def headers(self) -> Iterator[DocumentHeader | Reject]:
        """Iterate over the headers and rejects of all parts, by position. Raises ValueError for a damaged part."""
        parts = (self._read_part(self.part(task, "jsonl")) for task in range(self.tasks))
        return map(itemgetter(1), heapq.merge(*parts, key=itemgetter(0)))

    def _read_part(self, path: Path) -> Iterator[tuple[DocumentPosition, DocumentHeader | Reject]]:
        for position, about in read_items(path, self.directory):
            if isinstance(about, dict):
                yield position, Reject(**about)
            else:
                *fields, ends, heading = about
                yield position, DocumentHeader(*fields, ends and Ends(*ends), heading)  # type: ignore[call-arg]

    def remove(self, keep_logs: bool = False) -> None:
        """Remove the working directory (except its logs if they are kept), and leftovers of interrupted removals."""
        if keep_logs:
            for path in self.directory.glob("*"):
                if path == self.logs:
                    continue
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        else:
            self._remove(self.directory)
        for left_over in self._beside("removed-*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def _remove(self, directory: Path) -> None:
        removed = self.output.with_name(f".{self.output.name}.removed-{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            directory.rename(removed)  # first, so that a task still running there cannot move half of it to OUT
        shutil.rmtree(removed, ignore_errors=True)

    def _beside(self, pattern: str) -> list[Path]:
        return sorted(self.output.parent.glob(f".{glob.escape(self.output.name)}.{pattern}"))


def changed_options(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return the names of the options that differ, separated by commas."""
    return ", ".join(sorted(name for name in {*old, *new} if old.get(name) != new.get(name)))
