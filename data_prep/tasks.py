"""A preparation in parts, by tasks that know nothing of one another: on several nodes, in any order, killed at will.

.OUT.parts-KEY/            beside the output; KEY stands for inputs and options, the number of tasks among them
    options.json
    part-NNNNN             what task NNNNN made; there as soon as that task is done
    lock                   held by the task that joins the parts
    joined-*/              what it makes of them; moves to OUT when it is whole

A part has a line of JSON for each document, its tokens behind it, and `null` at the end.

Nothing but renames decides what is there, since locks of shared file systems do not always reach from node to node.
Without them several tasks may join at once, for nothing: each makes the same bytes in a directory of its own.
"""

import fcntl
import glob
import hashlib
import heapq
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_prep.documents import Place, Reject
from data_prep.writing import Tokens, replace_directory
from infini_train.data.index import atomic_file

OPTIONS = "options.json"


class Parts:
    """The parts that `tasks` tasks make of a preparation of `output` with `options`."""

    def __init__(self, output: Path, options: dict[str, Any], tasks: int, overwrite: bool) -> None:
        self.output = output.resolve()
        self.options = options | {"tasks": tasks}
        self.overwrite = overwrite
        key = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()[:16]
        self.directory = self.output.with_name(f".{self.output.name}.parts-{key}")
        self.paths = [self.directory / f"part-{task:05d}" for task in range(tasks)]

    def open(self) -> None:
        """Make the directory. Raises ValueError if tasks with other options are unfinished and not to be replaced."""
        for other in self._beside("parts-*"):
            if other == self.directory:
                continue
            if not self.overwrite:
                raise ValueError(
                    f"{other} holds unfinished work, made with other options ({self._difference(other)}): "
                    "give those to finish it, or --overwrite to throw it away"
                )
            self._remove(other)
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / OPTIONS).exists():
            with atomic_file(self.directory / OPTIONS) as f:
                f.write(json.dumps(self.options, indent=1).encode() + b"\n")

    def write(self, task: int, items: Iterable[tuple[Place, Tokens | Reject]]) -> None:
        """Make `items`, whose places ascend, the part of `task`."""
        with atomic_file(self.paths[task]) as f:
            for place, item in items:
                about = asdict(item)
                data = about.pop("data", b"")
                f.write(json.dumps([place, about, len(data)]).encode() + b"\n" + data)
            f.write(b"null\n")

    def missing(self) -> list[int]:
        """The tasks that are not done."""
        there = set(os.listdir(self.directory))  # NFS may remember of a single file that it was not there
        return [task for task, path in enumerate(self.paths) if path.name not in there]

    def items(self) -> Iterator[Tokens | Reject]:
        """All documents and rejects, in the order of a run without tasks; one of each part is in memory."""
        return map(itemgetter(1), heapq.merge(*map(_read_part, self.paths), key=itemgetter(0)))

    @contextmanager
    def joining(self) -> Iterator[Path | None]:
        """A directory that becomes `output` when the block ends well; None if another task is at it.

        Raises FileNotFoundError if another task finishes first.
        """
        with open(self.directory / "lock", "wb") as lock:  # a file, since NFS knows no locks of directories
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            except OSError:
                pass  # a file system without locks
            joined = self.directory / f"joined-{uuid.uuid4().hex}"
            joined.mkdir()
            try:
                yield joined
                replace_directory(self.output, joined)
            except BaseException:
                shutil.rmtree(joined, ignore_errors=True)
                raise
            self.remove()

    def remove(self) -> None:
        """Remove all parts, and what was left of removals that were cut short."""
        self._remove(self.directory)
        for left_over in self._beside("removed-*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def _remove(self, directory: Path) -> None:
        removed = self.output.with_name(f".{self.output.name}.removed-{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            directory.rename(removed)  # at once, so that nobody who is still at work there moves half of it to OUT
        shutil.rmtree(removed, ignore_errors=True)

    def _beside(self, pattern: str) -> list[Path]:
        return sorted(self.output.parent.glob(f".{glob.escape(self.output.name)}.{pattern}"))

    def _difference(self, other: Path) -> str:
        try:
            return changed_options(json.loads((other / OPTIONS).read_bytes()), self.options)
        except FileNotFoundError:  # killed before it wrote them
            return "unknown"


def changed_options(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The names of those that differ."""
    return ", ".join(sorted(name for name in {*old, *new} if old.get(name) != new.get(name)))


def _read_part(path: Path) -> Iterator[tuple[Place, Tokens | Reject]]:
    with open(path, "rb") as f:
        for line in f:
            try:
                head = json.loads(line)
            except ValueError:
                break
            if head is None:
                return
            place, about, size = head
            yield place, Reject(**about) if "reason" in about else Tokens(**about, data=f.read(size))
    raise ValueError(f"{path} is truncated: remove it and run its task again")
