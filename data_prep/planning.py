"""Plans which documents make up which shard: leaves out duplicates, joins groups, and splits off validation data.

Planning reads only the headers of the tokenised documents, and in the order of the documents in the inputs. The plan
therefore does not depend on the number of tasks that have read the inputs or that will write the shards.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.documents import Reject
from data_prep.item_files import ItemWriter, read_items
from data_prep.near_duplicates import NAME, NearDuplicates
from data_prep.seen import SEEN, Seen
from data_prep.split import Split, split_parts
from data_prep.summary import Summary
from data_prep.tokenising import Ends
from data_prep.work import SUMMARY, DocumentHeader, Work
from data_prep.writing import ShardFiller
from infini_train.files import new_directory
from infini_train.tokenizer.loading import Tokenizer

SHARDS, REJECTS, SEAMS = "shards.json", "rejects.jsonl", "seams.tokens"
SEPARATOR = "\n\n"  # text between documents that are joined
MOST_SAME_IDS = 0.2  # share of documents with the id of an earlier one and another text, at most
SEAM = -1  # stands for the file of seams where otherwise the number of a part stands

Slice = tuple[int, int, int]  # number of a part, byte offset of tokens in its file, number of tokens


class TooFewDocuments(ValueError):
    """The inputs hold too few documents to make a dataset."""


class UnknownField(ValueError):
    """No record has a field that an option names."""


@dataclass
class PlannedDocument:
    """A document of the output: one document of the inputs, or several that are joined."""

    id: str
    source: str
    slices: list[Slice]  # where its tokens are

    @property
    def tokens(self) -> int:
        return sum(count for _, _, count in self.slices)


@dataclass
class Group:
    """Documents of the inputs that make up one document of the output."""

    id: str
    source: str
    members: list[tuple[Slice, Ends | None, str]] = field(default_factory=list)  # tokens, ends and heading of each


class Joiner:
    """Joins documents so that their tokens are those of the joined text, with the heading of each before it.

    The tokens at the seam of two documents depend on both, so the tail of the first, SEPARATOR and the head of the
    second are encoded here. `directory` is that of the plan, where the tokens of the seams are written.
    """

    def __init__(self, tokenizer: Tokenizer, directory: Path):
        self._tokenizer = tokenizer
        self._file = open(directory / SEAMS, "wb")  # noqa: SIM115  closed by `close`
        self._separator: list[Slice] = []

    def join(self, group: Group) -> PlannedDocument:
        """Return the document that a group becomes."""
        if len(group.members) == 1 and not group.members[0][2]:
            return PlannedDocument(group.id, group.source, [group.members[0][0]])
        size = np.dtype(self._tokenizer.dtype).itemsize
        slices: list[Slice] = []
        text = ""  # since the last place where the joined text was cut
        for number, ((part, offset, tokens), ends, heading) in enumerate(group.members):
            assert ends, "members of a group have ends"
            text += SEPARATOR * (number > 0) + heading + ends.head
            if ends.tail is None:
                continue
            skipped = 0
            if number or heading:
                slices += self._seam(text, bool(slices))
                skipped = 1 + ends.head_tokens
            slices.append((part, offset + skipped * size, tokens - skipped - ends.tail_tokens - 1))
            text = ends.tail
        slices += self._seam(text, bool(slices))
        slices.append(self._write([self._tokenizer.eos_id]))
        return PlannedDocument(group.id, group.source, slices)

    def close(self) -> None:
        self._file.close()

    def _seam(self, text: str, follows: bool) -> list[Slice]:
        """Encode text between slices of documents; `follows` tells whether it does not begin the joined text."""
        if text == SEPARATOR and self._separator:  # between all documents, if the tokenizer is seamless
            return self._separator
        slices = [] if follows else [self._write([self._tokenizer.bos_id])]
        for number, piece in enumerate(self._tokenizer.pieces(text)):
            slices.append(self._write(self._tokenizer.encode_piece(piece, follows or number > 0)))
        if text == SEPARATOR:
            self._separator = slices
        return slices

    def _write(self, ids: list[int]) -> Slice:
        offset = self._file.tell()
        self._file.write(np.array(ids, self._tokenizer.dtype).tobytes())
        return SEAM, offset, len(ids)


class Planner:
    """Makes the plan of a preparation.

    Args:
        work: the working directory, whose inputs have been read.
        tokenizer: encodes the seams of joined documents.
        inputs: names of the inputs, for messages.
        seen: digests of the dataset to which documents are appended, None for a new dataset.
        accept: make a dataset even if little of the inputs became text.
    """

    def __init__(self, work: Work, tokenizer: Tokenizer, inputs: list[str], seen: Path | None, accept: bool):
        self.work, self.tokenizer, self.inputs, self.accept = work, tokenizer, inputs, accept
        self.kept = 0  # documents of the inputs that are not left out, before they are joined
        self.rejects: Counter[str] = Counter()
        self.examples: dict[str, Reject] = {}  # the first reject of each reason
        self.seen = Seen(seen)
        base = work.options.get("base")
        self.parts = [
            PartPlan(part, work.options["shard_tokens"], *(base[part] if base else (0, 0)))
            for part in split_parts(work.options)
        ]

    def make(self) -> None:
        """Write the plan unless it exists.

        Raises:
            TooFewDocuments: a part of the dataset would be empty.
            ValueError: no record has the field that an option names, too many documents have the id of an earlier
                one, or little of the inputs became text.
        """
        if self.work.plan.exists():
            return
        with new_directory(self.work.plan) as directory:
            with ExitStack() as stack:
                self.rejects_file = stack.enter_context(open(directory / REJECTS, "w"))
                for part in self.parts:
                    part.directory = directory
                    stack.callback(part.close)
                # A dataset that grows has a document in every part already, so none needs to be held back.
                hold = "base" not in self.work.options
                split = Split[PlannedDocument](self.work.options, hold)
                joiner = Joiner(self.tokenizer, directory)
                stack.callback(joiner.close)
                for document in map(joiner.join, self._groups(self._kept())):
                    if document.tokens < (least := self.work.options["min_tokens"]):
                        self._reject(document, "too_short", f"{document.tokens} tokens, expected at least {least}")
                        continue
                    for ready, number in split.add(document):
                        self.parts[number].add(ready)
                for ready, number in split.finish():
                    self.parts[number].add(ready)
            self._check()
            self.seen.save(directory / SEEN)
            (directory / SUMMARY).write_text(json.dumps(self._summary().to_json()))
            shards = [shard for part in self.parts for shard in part.shards]
            (directory / SHARDS).write_text(json.dumps(shards))

    def _reject(self, document: DocumentHeader | PlannedDocument, reason: str, detail: str) -> None:
        self._write(Reject(document.id, document.source, reason, detail))

    def _write(self, reject: Reject) -> None:
        self.rejects[reject.reason] += 1
        self.examples.setdefault(reject.reason, reject)
        self.rejects_file.write(json.dumps(vars(reject)) + "\n")

    def _kept(self) -> Iterator[DocumentHeader]:
        """Iterate over the documents that are not duplicates, and record all others as rejects."""
        filters = [name for name, _ in self.work.options.get("pipeline", [])]
        near = NearDuplicates(self.work) if NAME in filters else None
        for header in self.work.headers():
            if isinstance(header, Reject):
                self._write(header)
                continue
            cluster, kept = near.of(header) if near else (0, None)
            if kept is not None:
                self._reject(header, NAME, f"nearly the text of {kept}")
            elif fault := self.seen.fault(header):
                self._reject(header, *fault)
            else:
                if near:
                    near.keep(cluster, header)
                self.kept += 1
                yield header

    def _summary(self) -> Summary:
        """Return what planning adds to the counts of reading: the near-duplicates that it has left out."""
        summary = Summary()
        if self.rejects[NAME]:
            summary.filtered(f"{len(self.work.options['pipeline'])}. {NAME}")["left out"] = self.rejects[NAME]
        return summary

    def _groups(self, headers: Iterable[DocumentHeader]) -> Iterator[Group]:
        """Group documents, at the position of each group's first document; without a group, each is one by itself."""
        groups: dict[str, Group] = {}
        found: list[Group] = []  # with `join`, any later document may still belong to an earlier group
        for header in headers:
            new = Group(header.group or header.id, header.group or header.source)
            group = new if header.group is None else groups.setdefault(header.group, new)
            group.members.append(((header.part, header.offset, header.tokens), header.ends, header.heading))
            if not self.work.options["join"]:
                yield group
            elif group is new:
                found.append(group)
        yield from found

    def _check(self) -> None:
        """Raise what `make` raises."""
        documents = sum(part.documents for part in self.parts)
        empty = [part.part for part in self.parts if not part.documents] if "base" not in self.work.options else []
        if empty or not documents:
            found = "a single document" if documents == 1 else f"{documents} documents"
            what = f"{found}, too few to split (none is left for {empty[0]})," if documents else "no document"
            because = f" ({format_counts(self.rejects)} left out)" if self.rejects else ""
            message = f"{what} in {', '.join(self.inputs)}{because}"
            raise TooFewDocuments("\n".join([message, *self._example_lines()]))
        summary, options = self.work.summary(), self.work.options
        for option in ("join", "id_field"):
            field, default = options[option], {"join": None, "id_field": "id"}[option]
            if field and field != default and field.split(":")[0] != "directory" and not summary.fields[option]:
                records = summary.fields["records"]
                raise UnknownField(f"{option}: found {field!r}, a field that none of {records:,} records has")
        if not self.accept:
            self._check_ids()
        if not self.accept and (fault := summary.fault()):
            raise ValueError("\n".join([fault, *summary.lines(), *self._example_lines()]))

    def _check_ids(self) -> None:
        """Raise ValueError if many documents are left out for ids that are not theirs alone."""
        same = self.rejects["duplicate_id"]
        if same <= MOST_SAME_IDS * (same + self.kept):
            return
        if "base" in self.work.options:
            otherwise = (
                "`append` names documents as the dataset does, so give inputs other names if their documents are "
                "named by file and line, or make the dataset anew with another --id_field"
            )
        else:
            otherwise = "--id_field names another field, and --id_field '' makes ids of file and line"
        raise ValueError(
            f"{same:,} of {same + self.kept:,} documents have the id of an earlier one with another text (the first "
            f"is {self.examples['duplicate_id'].id}), as if several sources numbered their documents alike; expected "
            f"at most {MOST_SAME_IDS:.0%}. {otherwise}. --accept leaves these documents out."
        )

    def _example_lines(self) -> list[str]:
        """Return a line for the first reject of each reason."""
        return [
            f"  {reject.reason}: {reject.id}{reject.detail and ': '}{reject.detail[:200]}"
            for _, reject in sorted(self.examples.items())
        ]


class PartPlan:
    """Writes the plan of one dataset: a file for each shard, with its documents (item_files.py).

    Args:
        part: subdirectory of the dataset, one of `split_parts`.
        shard_tokens: tokens of a shard.
        shards: number of shards that the dataset has already.
        documents: number of documents that the dataset has already.
    """

    directory: Path

    def __init__(self, part: str, shard_tokens: int, shards: int, documents: int):
        self.part = part
        self.filler = ShardFiller(shard_tokens, shards)
        self.number, self.documents = documents, 0
        self.shards: list[str] = []
        self._file: BinaryIO | None = None
        self._shard = 0  # number of the shard whose file is open

    def add(self, document: PlannedDocument) -> None:
        shard = self.filler.add(document.tokens)
        if self._file is None or shard != self._shard:
            self.close()
            self._shard = shard
            self.shards.append(str(Path(self.part) / f"shard-{shard:05d}.tar"))
            path = self.directory / f"{self.shards[-1]}.jsonl"
            path.parent.mkdir(exist_ok=True)
            self._file = open(path, "wb")  # noqa: SIM115  closed by `close`
            self._writer = ItemWriter(self._file)
        self._writer.add((self.number, document.id, document.source, document.slices))
        self.number, self.documents = self.number + 1, self.documents + 1

    def close(self) -> None:
        if self._file:
            self._writer.close()
            self._file.close()
            self._file = None


def read_plan(work: Work, shard: str) -> Iterator[tuple[int, PlannedDocument]]:
    """Read the numbers and documents planned for a shard. Raises ValueError if the plan is truncated."""
    for number, *fields in read_items(work.plan / f"{shard}.jsonl", work.plan):
        yield number, PlannedDocument(*fields)


def format_counts(rejects: Counter[str]) -> str:
    """Format counts of rejects by reason for messages, such as `1 bad_json, 2 duplicate`."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(rejects.items()))


def count_rejects(path: Path) -> Counter[str]:
    """Count the documents of a rejects.jsonl by reason."""
    with open(path) as f:
        return Counter(json.loads(line)["reason"] for line in f)
