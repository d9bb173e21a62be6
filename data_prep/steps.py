"""The stages of a preparation, as pipelines of datatrove: read and tokenise, plan, write shards, finish."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from data_prep.documents import Document, DocumentReader, Place, Reject
from data_prep.engine import Stage
from data_prep.finished import parts_of
from data_prep.indexing import build_index
from data_prep.planning import REJECTS, SEEN, SHARDS, Planned, Planner, read_plan
from data_prep.work import Work
from data_prep.writing import Tokens, write_shard, write_tokenizer
from infini_train.data.index import INDEX_JSON, DatasetIndex
from infini_train.files import atomic_file, digest_of, replace_directory
from infini_train.tokenizer.loading import Tokenizer, load_tokenizer

JOINT = "\n\n"  # between documents that are joined


class Step(PipelineStep):
    """One of ours; `name` and `type` are what datatrove's statistics say."""

    type = "infini-train"

    def __init__(self, work: Work, tokenizer: Path, inputs: list[str]):
        super().__init__()
        self.work, self.tokenizer, self.inputs = work, tokenizer, inputs


class Read(Step):
    """This task's documents and rejects, with their places."""

    name = "read"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Place, Document | Reject]]:
        options = self.work.options
        reader = DocumentReader(
            self.work.inputs(),
            options["text_field"],
            options["id_field"],
            rank,
            world_size,
            unicode_form=options["unicode_form"],
            join=options["join"],
        )
        for place, item in reader.placed():
            if isinstance(item, Reject):
                self.stat_update(f"left out: {item.reason}")
            else:
                self.stat_update("characters", value=len(item.text))
            yield place, item


class Tokenise(Step):
    """Documents become (id, source, digest, group, tokens)."""

    name = "tokenise"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Place, Any]]:
        tokenizer = load_tokenizer(self.tokenizer)
        if tokenizer.sha256 != self.work.options["tokenizer_sha256"]:
            raise ValueError(f"{self.tokenizer} is another tokenizer than when this work began")
        for place, item in data:
            if isinstance(item, Document):
                with self.track_time():
                    tokens = tokenizer.encode(item.text)
                self.stat_update("tokens", value=len(tokens))
                digest = digest_of(item.text.encode()).hex()
                yield place, (item.id, item.source, digest, item.group, tokens)
            else:
                yield place, item


class WritePart(Step):
    """Keeps what this task has read."""

    name = "write part"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        self.work.write_part(rank, data)


class Plan(Step):
    """Decides what goes where."""

    name = "plan"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        joint = len(load_tokenizer(self.tokenizer).encode(JOINT)) - 2
        base = "base" in self.work.options
        Planner(self.work, joint, self.inputs, self.work.output / SEEN if base else None).make()


class WriteShards(Step):
    """Writes this task's shards, every world_size-th, and their indexes."""

    name = "write shards"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        tokenizer = load_tokenizer(self.tokenizer)
        joint = tokenizer.encode(JOINT)[1:-1].tobytes()
        files: dict[int, Any] = {}
        try:
            for name in _shards(self.work)[rank::world_size]:
                if (self.work.index_of(name) / INDEX_JSON).exists():
                    continue
                path = self.work.made / name
                path.parent.mkdir(exist_ok=True)
                documents = ((n, self._tokens(one, joint, files, tokenizer)) for n, one in read_plan(self.work, name))
                write_shard(path, documents, tokenizer.sha256)
                index = build_index(path.parent, [path.name], tokenizer, {})
                index.root = self.work.index_of(name)
                index.root.mkdir(parents=True, exist_ok=True)
                index.save()
                self.stat_update("shards")
                self.stat_update("tokens", value=index.total_tokens)
        finally:
            for file in files.values():
                file.close()

    def _tokens(self, document: Planned, joint: bytes, files: dict[int, Any], tokenizer: Tokenizer) -> Tokens:
        size = np.dtype(tokenizer.dtype).itemsize
        pieces = []
        for part, offset, count in document.pieces:
            if part not in files:
                if len(files) > 100:
                    files.pop(next(iter(files))).close()
                files[part] = open(self.work.part(part, "tokens"), "rb")  # noqa: SIM115  closed by `run`
            files[part].seek(offset)
            piece = files[part].read(count * size)
            if len(piece) != count * size:
                raise ValueError(f"{files[part].name} is truncated: remove {self.work.directory} and begin again")
            pieces.append(piece)
        data = pieces[0]
        if len(pieces) > 1:
            data = data[:size] + joint.join(piece[size:-size] for piece in pieces) + data[-size:]
        assert len(data) == document.count * size
        return Tokens(document.id, document.source, data, document.count)


class Finish(Step):
    """Makes the datasets' indexes and moves all to its place."""

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
            for left_over in root.rglob(".*.tmp"):  # of tasks that were killed
                left_over.unlink()
        if "base" in work.options:
            self._append(shards)
        else:
            special = ("bos_id", "eos_id")
            for place, indexes in shards.items():
                root = work.made / place
                write_tokenizer(root, tokenizer)
                index = DatasetIndex.concatenated(root, indexes)
                index.options = {name: value for name, value in work.options.items() if name not in special}
                (root / INDEX_JSON).unlink(missing_ok=True)  # of a task that was killed
                index.save()
            for name in (REJECTS, SEEN):
                _copy(work.plan / name, work.made / name)
            replace_directory(work.output, work.made)
        for place, index in parts_of(work.output).items():
            logger.info(f"{place}: {index.documents:,} documents, {index.total_tokens:,} tokens")
        if self.keep_logs:
            work.remove(keep_logs=True)

    def _append(self, shards: dict[str, list[DatasetIndex]]) -> None:
        """New shards first, then what says that they are there: killed in between, it can be done again."""
        work = self.work
        datasets = parts_of(work.output)
        inputs = work.options["inputs"]
        earlier = {
            place: [one for one in index.options.get("appended", []) if one["inputs"] != inputs]
            for place, index in datasets.items()
        }
        for name in _shards(work):
            if (work.made / name).exists():
                os.replace(work.made / name, work.output / name)
        appends = 1 + max(map(len, earlier.values()))
        for name, target in ((REJECTS, f"rejects-{appends}.jsonl"), (SEEN, SEEN)):
            _copy(work.plan / name, work.output / target)
        for place, old in datasets.items():
            if len(old.options.get("appended", [])) == appends:
                continue
            index = DatasetIndex.concatenated(old.root, [old, *shards.get(place, [])])
            before = {"inputs": inputs, "shards": len(old.shards), "documents": old.documents}
            index.options = old.options | {"appended": [*earlier[place], before]}
            index.save()


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as whole, atomic_file(target) as f:
        shutil.copyfileobj(whole, f)


def _shards(work: Work) -> list[str]:
    return json.loads((work.plan / SHARDS).read_text())


def stages_of(work: Work, tokenizer: Tokenizer, inputs: list[str], remote: bool) -> list[Stage]:
    """All stages; remote: the logs stay, as jobs still write to them."""
    told = work, tokenizer.path.resolve(), inputs
    return [
        Stage("read", [Read(*told), Tokenise(*told), WritePart(*told)], work.tasks),
        Stage("plan", [Plan(*told)], 1),
        Stage("write", [WriteShards(*told)], work.tasks),
        Stage("finish", [Finish(*told, keep_logs=remote)], 1),
    ]
