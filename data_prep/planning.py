"""Which documents make up which shard: duplicates left out, groups joined, the split, all decided from parts' heads.

The plan depends on the order of documents in the inputs, not on who read them, so any number of tasks may write it.
"""

import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from data_prep.documents import Reject
from data_prep.work import Head, Work
from data_prep.writing import Filling, Split
from infini_train.files import DIGEST_BYTES, digest_of

SHARDS, REJECTS, SEEN = "shards.json", "rejects.jsonl", "seen.npz"


class TooFewDocuments(ValueError):
    """There is nothing to make a dataset of."""


@dataclass
class Planned:
    """A document of the output. pieces: (part, byte offset, tokens) of what it is joined of, mostly one.

    joint: tokens between two pieces.
    """

    id: str
    source: str
    joint: int
    pieces: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Tokens; pieces lose their BOS and EOS."""
        return 2 + sum(tokens - 2 for _, _, tokens in self.pieces) + self.joint * (len(self.pieces) - 1)


class Seen:
    """Digests of the texts and ids of all documents so far, about 200 bytes of memory each."""

    def __init__(self, path: Path | None):
        self.texts: dict[bytes, None] = {}
        self.ids: dict[bytes, None] = {}
        if path:
            with np.load(path, allow_pickle=False) as arrays:
                self.texts = dict.fromkeys(row.tobytes() for row in arrays["texts"])
                self.ids = dict.fromkeys(row.tobytes() for row in arrays["ids"])

    def fault(self, head: Head) -> tuple[str, str] | None:
        """Reason and detail why a document is left out; else it counts as seen."""
        text = bytes.fromhex(head.digest)
        id = digest_of(head.id.encode(errors="surrogatepass"))
        if text in self.texts:
            return "duplicate", "its text is that of an earlier document"
        if id in self.ids:
            return "duplicate_id", "an earlier document with another text has this id: --id-field names another field"
        self.texts[text] = self.ids[id] = None
        return None

    def save(self, path: Path) -> None:
        def rows(digests: Iterable[bytes]) -> np.ndarray:
            return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)

        with open(path, "wb") as f:
            np.savez(f, texts=rows(self.texts), ids=rows(self.ids))


class Planner:
    """Makes the plan of a work.

    Args:
        joint: tokens between joined pieces.
        inputs: for messages.
        seen: what an existing dataset, to which this is appended, has.
    """

    def __init__(self, work: Work, joint: int, inputs: list[str], seen: Path | None):
        self.work, self.joint, self.inputs = work, joint, inputs
        self.rejects: Counter[str] = Counter()
        self.seen = Seen(seen)
        base = work.options.get("base")
        parts = ("train", "valid") if work.options["validation_fraction"] else (".",)
        self.parts = [
            PartPlan(part, work.options["shard_tokens"], *(base[part] if base else (0, 0))) for part in parts
        ]

    def make(self) -> None:
        """Raises TooFewDocuments."""
        if self.work.plan.exists():
            return
        directory = self.work.plan.with_name(f"plan-{uuid.uuid4().hex}")
        directory.mkdir()
        try:
            with ExitStack() as stack:
                self.rejects_file = stack.enter_context(open(directory / REJECTS, "w"))
                for part in self.parts:
                    part.directory = directory
                    stack.callback(part.close)
                # Grown, a dataset keeps its split, and has a validation document.
                split = Split[Planned](self.work.options["validation_fraction"], hold="base" not in self.work.options)
                for document in self._joined(self._kept()):
                    if document.count < (least := self.work.options["min_tokens"]):
                        self._reject(document, "too_short", f"{document.count} tokens, expected at least {least}")
                        continue
                    for ready, number in split.add(document):
                        self.parts[number].add(ready)
                for ready, number in split.finish():
                    self.parts[number].add(ready)
            self._check()
            self.seen.save(directory / SEEN)
            shards = [shard for part in self.parts for shard in part.shards]
            (directory / SHARDS).write_text(json.dumps(shards))
            directory.rename(self.work.plan)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _reject(self, document: Head | Planned, reason: str, detail: str) -> None:
        self._write(Reject(document.id, document.source, reason, detail))

    def _write(self, reject: Reject) -> None:
        self.rejects[reject.reason] += 1
        self.rejects_file.write(json.dumps(asdict(reject)) + "\n")

    def _kept(self) -> Iterator[Head]:
        for head in self.work.heads():
            if isinstance(head, Reject):
                self._write(head)
            elif fault := self.seen.fault(head):
                self._reject(head, *fault)
            else:
                yield head

    def _joined(self, heads: Iterable[Head]) -> Iterator[Planned]:
        """Of each group one document, in the place of its first; those without a group as they are."""
        groups: dict[str, Planned] = {}
        found: list[Planned] = []  # where groups may have more to come, all wait
        for head in heads:
            if head.group is None:
                document = Planned(head.id, head.source, self.joint)
            elif (known := groups.get(head.group)) is None:
                document = groups[head.group] = Planned(head.group, head.group, self.joint)
            else:
                known.pieces.append((head.part, head.offset, head.tokens))
                continue
            document.pieces.append((head.part, head.offset, head.tokens))
            if self.work.options["join"]:
                found.append(document)
            else:
                yield document
        yield from found

    def _check(self) -> None:
        documents = sum(part.documents for part in self.parts)
        if documents < (len(self.parts) if "base" not in self.work.options else 1):
            what = "no document" if not documents else "a single document, too few to split,"
            left_out = counted(self.rejects)
            because = f" ({left_out} left out)" if left_out else ""
            raise TooFewDocuments(f"{what} in {', '.join(self.inputs)}{because}")


class PartPlan:
    """The shards of one dataset, a file each: a line for each document, and `null` at the end."""

    directory: Path

    def __init__(self, part: str, shard_tokens: int, shards: int, documents: int):
        self.part = part
        self.filling = Filling(shard_tokens, shards)
        self.number, self.documents = documents, 0
        self.shards: list[str] = []
        self._file: IO[str] | None = None

    def add(self, document: Planned) -> None:
        name = str(Path(self.part) / f"shard-{self.filling.add(document.count):05d}.tar")
        if not self.shards or self.shards[-1] != name:
            self.close()
            self.shards.append(name)
            path = self.directory / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            self._file = open(path, "w")  # noqa: SIM115  closed by `close`
        assert self._file is not None
        told = {"number": self.number, **asdict(document)}
        self._file.write(json.dumps(told) + "\n")
        self.number, self.documents = self.number + 1, self.documents + 1

    def close(self) -> None:
        if self._file:
            self._file.write("null\n")
            self._file.close()
            self._file = None


def read_plan(work: Work, shard: str) -> Iterator[tuple[int, Planned]]:
    """Numbers and documents of a shard. Raises ValueError if its plan has lost its end."""
    path = work.plan / f"{shard}.jsonl"
    with open(path) as f:
        for line in f:
            if (told := json.loads(line)) is None:
                return
            number = told.pop("number")
            yield number, Planned(**told)
    raise ValueError(f"{path} is truncated: remove {work.plan} and run again")


def counted(rejects: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(rejects.items()))


def left_out(path: Path) -> Counter[str]:
    """Of a rejects.jsonl, how many documents were left out for each reason."""
    with open(path) as f:
        return Counter(json.loads(line)["reason"] for line in f)
