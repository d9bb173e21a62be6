"""The four stages of a preparation as datatrove pipelines: read and tokenise, plan, write shards, finish."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from data_prep.documents import Document, DocumentPosition, DocumentReader, Reject
from data_prep.engine import Stage
from data_prep.filtering import Filters
from data_prep.finished import parts_of
from data_prep.indexing import build_index
from data_prep.planning import REJECTS, SEAM, SEAMS, SHARDS, PlannedDocument, Planner, read_plan
from data_prep.seen import SEEN
from data_prep.tokenising import TokenisedText
from data_prep.work import Work
from data_prep.writing import TokenisedDocument, write_shard
from infini_train.data.index import BLOCK_BYTES, INDEX_JSON, DatasetIndex
from infini_train.files import atomic_file, replace_directory
from infini_train.tokenizer.loading import Tokenizer, load_tokenizer


class ShardingStep(PipelineStep):
    """Base of the steps below. datatrove shows `name` and `type` in its statistics.

    datatrove pickles steps for SLURM jobs, so a step keeps the path of the tokenizer and loads it when it runs.

    Args:
        work: the preparation's working directory.
        tokenizer: path of the tokenizer.
        inputs: the inputs as given, for messages.
    """

    type = "infini-train"

    def __init__(self, work: Work, tokenizer: Path, inputs: list[str]):
        super().__init__()
        self.work, self.tokenizer, self.inputs = work, tokenizer, inputs


class Read(ShardingStep):
    """Reads this task's documents and rejects, with their positions in the corpus, and filters the documents."""

    name = "read"

    def run(
        self, data: Any, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[DocumentPosition, Document | Reject]]:
        options = self.work.options
        how = ("unicode_form", "line_ends", "join", "heading", "encoding", "chat_template", "as_text")
        reader = DocumentReader(
            self.work.inputs(),
            options["text_field"],
            options["id_field"],
            rank,
            world_size,
            **{name: options[name] for name in how if name in options},
        )
        filters = Filters(options.get("pipeline", []))
        for position, item in reader.with_positions():
            if filters.blocks and isinstance(item, Document):
                item = item.whole()
                if isinstance(item, Document):
                    item = filters.apply(item, reader.summary)
            yield position, item
        self.work.write_summary(rank, reader.summary)


class WritePart(ShardingStep):
    """Tokenises what this task has read, and writes it to its part of the working directory."""

    name = "tokenise"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        tokenizer = load_tokenizer(self.tokenizer)
        if tokenizer.sha256 != self.work.options["tokenizer_sha256"]:
            raise ValueError(f"{self.tokenizer} is not the tokenizer with which this work began")
        joins = self.work.options["join"] is not None
        items = (
            (position, item if isinstance(item, Reject) else (item, TokenisedText(item.text, tokenizer, joins)))
            for position, item in data
        )
        for name, count in self.work.write_part(rank, items).items():
            self.stat_update(name, value=count)


class PlanShards(ShardingStep):
    """Decides which documents go to which shard (planning.py).

    Args:
        arguments: as for every step.
        accept: make a dataset even if little of the inputs became text.
    """

    name = "plan"

    def __init__(self, *arguments: Any, accept: bool):
        super().__init__(*arguments)
        self.accept = accept

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        tokenizer = load_tokenizer(self.tokenizer)
        appends = "base" in self.work.options
        seen = self.work.output / SEEN if appends else None
        Planner(self.work, tokenizer, self.inputs, seen, self.accept).make()


class WriteShards(ShardingStep):
    """Writes this task's shards (every `world_size`-th of the plan) and an index of each."""

    name = "write shards"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        tokenizer = load_tokenizer(self.tokenizer)
        size = np.dtype(tokenizer.dtype).itemsize
        files: dict[int, Any] = {}
        try:
            for name in _shards(self.work)[rank::world_size]:
                if (self.work.index_of(name) / INDEX_JSON).exists():  # written before this task was interrupted
                    continue
                path = self.work.made / name
                path.parent.mkdir(exist_ok=True)
                documents = (
                    (n, TokenisedDocument(d.id, d.source, self._tokens(d, files, size), d.tokens))
                    for n, d in read_plan(self.work, name)
                )
                entries = write_shard(path, documents, tokenizer)
                index = build_index(path.parent, [(path.name, entries)], tokenizer, {})
                index.root = self.work.index_of(name)
                index.root.mkdir(parents=True, exist_ok=True)
                index.save()
                self.stat_update("shards")
                self.stat_update("tokens", value=index.total_tokens)
        finally:
            for file in files.values():
                file.close()

    def _tokens(self, document: PlannedDocument, files: dict[int, Any], size: int) -> Iterator[bytes]:
        """Read the tokens of a document, each of `size` bytes, block by block; `files` keeps up to 100 parts open."""
        for part, offset, count in document.slices:
            if part not in files:
                if len(files) > 100:
                    files.pop(next(iter(files))).close()
                path = self.work.plan / SEAMS if part == SEAM else self.work.part(part, "tokens")
                files[part] = open(path, "rb")  # noqa: SIM115  closed by `run`
            files[part].seek(offset)
            left = count * size
            while left:
                block = files[part].read(min(left, BLOCK_BYTES))
                if not block:
                    raise ValueError(f"{files[part].name} is truncated: remove {self.work.directory} and begin again")
                left -= len(block)
                yield block


class Finish(ShardingStep):
    """Makes the indexes of the datasets and moves everything to the output.

    Every move can be repeated, so that this step can be killed at any point and run again.

    Args:
        arguments: as for every step.
        keep_logs: for SLURM jobs, which still write to their logs: remove the working directory except its logs. A
            run on this machine removes all of it later.
    """

    name = "finish"

    def __init__(self, *arguments: Any, keep_logs: bool):
        super().__init__(*arguments)
        self.keep_logs = keep_logs

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        tokenizer, work = load_tokenizer(self.tokenizer), self.work
        shards: dict[str, list[DatasetIndex]] = {}
        for name in _shards(work):
            shards.setdefault(str(Path(name).parent), []).append(DatasetIndex.load(work.index_of(name)))
        for root in (work.made, work.output):
            for left_over in root.rglob(".*.tmp"):  # from tasks that were killed
                left_over.unlink()
        if "base" in work.options:
            self._append(shards)
        else:
            special = ("bos_id", "eos_id")  # the index has fields for them
            for part, indexes in shards.items():
                root = work.made / part
                tokenizer.save(root)
                index = DatasetIndex.concatenated(root, indexes)
                index.options = {name: value for name, value in work.options.items() if name not in special}
                (root / INDEX_JSON).unlink(missing_ok=True)  # from a task that was killed
                index.save()
            for name in (REJECTS, SEEN):
                _copy(work.plan / name, work.made / name)
            replace_directory(work.output, work.made)
        for part, index in parts_of(work.output).items():
            logger.info(f"{part}: {index.documents:,} documents, {index.total_tokens:,} tokens")
        for line in work.summary().lines():
            logger.info(line)
        if self.keep_logs:
            work.remove(keep_logs=True)

    def _append(self, shards: dict[str, list[DatasetIndex]]) -> None:
        """Add new shards to a dataset. The indexes change last, so that an interrupted append can be repeated."""
        work = self.work
        datasets = parts_of(work.output)
        inputs = work.options["inputs"]
        earlier = {
            part: [append for append in index.options.get("appended", []) if append["inputs"] != inputs]
            for part, index in datasets.items()
        }
        for name in _shards(work):
            if (work.made / name).exists():
                os.replace(work.made / name, work.output / name)
        appends = 1 + max(map(len, earlier.values()))
        for name, target in ((REJECTS, f"rejects-{appends}.jsonl"), (SEEN, SEEN)):
            _copy(work.plan / name, work.output / target)
        for part, old in datasets.items():
            if len(old.options.get("appended", [])) == appends:  # a run that was killed has finished this part
                continue
            index = DatasetIndex.concatenated(old.root, [old, *shards.get(part, [])])
            before = {"inputs": inputs, "shards": len(old.shards), "documents": old.documents}
            index.options = old.options | {"appended": [*earlier[part], before]}
            index.save()


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as content, atomic_file(target) as f:
        shutil.copyfileobj(content, f)


def _shards(work: Work) -> list[str]:
    """List the planned shards, by path below the output."""
    return json.loads((work.plan / SHARDS).read_text())


def stages_of(work: Work, tokenizer: Tokenizer, inputs: list[str], remote: bool, accept: bool) -> list[Stage]:
    """Return all stages of a preparation.

    Args:
        work: the working directory.
        tokenizer: encodes the documents.
        inputs: the inputs as given, for messages.
        remote: whether the stages run as SLURM jobs, whose logs are kept.
        accept: make a dataset even if little of the inputs became text.
    """
    common = work, tokenizer.path.resolve(), inputs
    return [
        Stage("read", [Read(*common), WritePart(*common)], work.tasks),
        Stage("plan", [PlanShards(*common, accept=accept)], 1),
        Stage("write", [WriteShards(*common)], work.tasks),
        Stage("finish", [Finish(*common, keep_logs=remote)], 1),
    ]
