"""The directory in which a preparation is made, `.OUT.work-KEY` beside the output; KEY stands for all its options.

options.json, inputs.jsonl   what is to be done
parts/part-NNNNN.jsonl       what task NNNNN has read: a line for each document and reject, and `null` at the end
parts/part-NNNNN.tokens      the documents' tokens, `BOS tokens EOS` after one another
plan/                        which documents make up which shard (planning.py)
made/                        the datasets; they move to OUT when they are whole
indexes/                     of each shard
logs/                        datatrove's, by stage: markers of finished tasks, logs, statistics

All files appear whole. A task finds what another has made by file names alone, on any node of a shared file system.
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
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_prep.documents import InputFile, Place, Reject, inputs_to_json, load_inputs
from infini_train.files import atomic_file

OPTIONS, INPUTS = "options.json", "inputs.jsonl"


@dataclass(frozen=True)
class Head:
    """A tokenised document of a part: where its tokens lie in the part's file (bytes), and what is known of it.

    digest: hex blake2b of the text, 16 bytes.
    """

    id: str
    source: str
    digest: str
    group: str | None
    part: int
    offset: int
    tokens: int


class Work:
    """One preparation of `output`. Options are plain JSON; whatever may change the output is among them."""

    def __init__(self, output: Path, options: dict[str, Any], tasks: int):
        self.output, self.options, self.tasks = output.resolve(), options, tasks
        told = json.dumps(options | {"tasks": tasks}, sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()[:16]
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
        return self.directory / "indexes" / shard

    def part(self, task: int, kind: str) -> Path:
        return self.directory / "parts" / f"part-{task:05d}.{kind}"

    def open(self, files: list[InputFile], overwrite: bool) -> None:
        """Make the directory. Raises ValueError if work with other options is unfinished and not to be replaced."""
        for other in self._beside("work-*"):
            if other == self.directory or not (other / OPTIONS).exists():  # of finished work, or just begun
                continue
            if not overwrite:
                told = json.loads((other / OPTIONS).read_bytes())
                raise ValueError(
                    f"{other} holds unfinished work, made with other options "
                    f"({changed_options(told, self.options | {'tasks': self.tasks})}): "
                    "give those to finish it, or --overwrite to throw it away"
                )
            self._remove(other)
        for name in ("parts", "made", "indexes"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        if not (self.directory / OPTIONS).exists():
            with atomic_file(self.directory / INPUTS) as f:
                f.write(inputs_to_json(files))
            with atomic_file(self.directory / OPTIONS) as f:
                f.write(json.dumps(self.options | {"tasks": self.tasks}, indent=1).encode() + b"\n")

    def inputs(self) -> list[InputFile]:
        return load_inputs(self.directory / INPUTS)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other run on this machine does the same meanwhile. Raises ValueError if one does."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.directory, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run is writing to {self.output}") from None
            except OSError:
                pass  # a file system without locks
            yield
        finally:
            os.close(lock)
            with suppress(OSError):  # there is something in it, or nothing any more
                self.directory.rmdir()

    def write_part(self, task: int, items: Iterable[tuple[Place, Any]]) -> None:
        """Of rejects, and (id, source, digest, group, tokens as an array) of documents; places ascend."""
        offset = 0
        with atomic_file(self.part(task, "jsonl")) as heads, atomic_file(self.part(task, "tokens")) as tokens_file:
            for place, item in items:
                if isinstance(item, Reject):
                    about = asdict(item)
                else:
                    id, source, digest, group, tokens = item
                    about = asdict(Head(id, source, digest, group, task, offset, len(tokens)))
                    offset += tokens_file.write(tokens.tobytes())
                heads.write(json.dumps([place, about]).encode() + b"\n")
            heads.write(b"null\n")

    def heads(self) -> Iterator[Head | Reject]:
        """Of all documents, in the order of their places in the inputs. Raises ValueError for a damaged part."""
        parts = (self._read_part(self.part(task, "jsonl")) for task in range(self.tasks))
        return map(itemgetter(1), heapq.merge(*parts, key=itemgetter(0)))

    @staticmethod
    def _read_part(path: Path) -> Iterator[tuple[Place, Head | Reject]]:
        with open(path, "rb") as f:
            for line in f:
                try:
                    head = json.loads(line)
                except ValueError:
                    break
                if head is None:
                    return
                place, about = head
                yield place, Reject(**about) if "reason" in about else Head(**about)
        raise ValueError(f"{path} is truncated: remove {path.parent.parent} and begin again")

    def remove(self, keep_logs: bool = False) -> None:
        """Remove all of it, and what was left of removals that were cut short."""
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
            directory.rename(removed)  # at once: nobody who is still at work there moves half of it to OUT
        shutil.rmtree(removed, ignore_errors=True)

    def _beside(self, pattern: str) -> list[Path]:
        return sorted(self.output.parent.glob(f".{glob.escape(self.output.name)}.{pattern}"))


def changed_options(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The names of those that differ."""
    return ", ".join(sorted(name for name in {*old, *new} if old.get(name) != new.get(name)))
