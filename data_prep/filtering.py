"""Runs datatrove's own filters and formatters on documents, as a pipeline file names them.

Near-duplicates are found when all documents are known (near_duplicates.py); here they get their signatures.
"""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from datatrove.data import Document as DatatroveDocument
from datatrove.pipeline import filters, formatters
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.pipeline.formatters.pii import PIIReplacer
from numpy.random import default_rng

from data_prep.documents import Document, Reject
from data_prep.near_duplicates import NAME, MinhashSignature
from data_prep.summary import Summary
from infini_train.files import digest_of

Pipeline = list[tuple[str, dict[str, Any]]]  # names and arguments of blocks

# What a pipeline cannot name, and why.
UNAVAILABLE = {
    "LambdaFilter": "it takes a function, which a file cannot hold",
    "URLFilter": "documents have no URL here: filter by URL before",
}
NOT_GIVEN = "exclusion_writer"  # an argument of all filters: what they leave out is in rejects.jsonl
# Arguments whose types datatrove states wrongly, as tuples of one pair: only the block itself can check their values.
UNCHECKED = {"top_n_grams", "dup_n_grams"}
# What a block raises for a text that it cannot judge, for instance because it has no words.
FAILURES = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
PROBE = (
    "This is a plain text, with which each block is tried before any document is read. It has several sentences, and "
    "the words that are common in English.\n\nThat is all that it has to be, and to have.\n"
)


def load_pipeline(path: Path) -> Pipeline:
    """Read a pipeline file, and try all blocks that it names.

    The file is a list in YAML. An item is the name of a class of datatrove.pipeline.filters or
    datatrove.pipeline.formatters, or MinhashDedupFilter as the last item, or a mapping of it to its arguments.

    Raises:
        OSError: the file, or one that a block needs, cannot be read.
        ValueError: the file is no such list, or a block cannot work as the file says.
    """
    try:
        items = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: found {type(items).__name__}, expected a list of datatrove's filters")
    pipeline: Pipeline = []
    for number, item in enumerate(items, 1):
        where = f"{path}, item {number}"
        if isinstance(item, str):
            item = {item: {}}
        if not isinstance(item, dict) or len(item) != 1:
            raise ValueError(f"{where}: found {item!r}, expected the name of a filter, or NAME: {{ARGUMENT: VALUE}}")
        ((name, arguments),) = item.items()
        try:
            Block.make(name, arguments or {}).apply(Document("probe", "probe", PROBE))
        except OSError:  # of a model or list that the block downloads
            raise
        except Exception as error:  # of any type: the blocks do not check their arguments
            raise ValueError(f"{where}, {name}: {' '.join(str(error).split())}") from None
        pipeline.append((name, arguments or {}))
    if any(name == NAME for name, _ in pipeline[:-1]):
        raise ValueError(f"{path}: found {NAME} before other blocks, expected it as the last item, and once")
    try:
        return json.loads(json.dumps(pipeline))
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Block:
    """One of datatrove's filters or formatters, with its arguments."""

    name: str
    step: BaseFilter | BaseFormatter | MinhashSignature
    seed: int  # of what it draws at random

    @staticmethod
    def make(name: str, arguments: Any) -> "Block":
        """Make a block.

        Raises:
            ImportError: a package that the block needs is missing.
            ValueError: there is no such block, or it has no such arguments.
        """
        known: dict[str, Any] = {NAME: MinhashSignature} | {
            name: kind
            for module, base in ((filters, BaseFilter), (formatters, BaseFormatter))
            for name, kind in vars(module).items()
            if inspect.isclass(kind) and issubclass(kind, base) and name not in UNAVAILABLE
        }
        if name not in known:
            because = UNAVAILABLE.get(name, f"expected one of {', '.join(sorted(known))}")
            raise ValueError(f"found a block that cannot be used: {because}")
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        checked = parser.add_class_arguments(known[name], skip={NOT_GIVEN, *UNCHECKED})
        names = [*checked, *sorted(UNCHECKED & inspect.signature(known[name]).parameters.keys())]
        unknown = [word for word in arguments if word not in names] if isinstance(arguments, dict) else [arguments]
        if unknown:
            raise ValueError(f"found {unknown[0]!r}, expected arguments among {', '.join(names) or 'none'}")
        given = {word: arguments[word] for word in arguments if word in checked}
        try:
            parsed = parser.parse_object(given)
        except jsonargparse.ArgumentError as error:
            raise ValueError(" ".join(str(error).split())) from None
        step = known[name](**arguments | {word: parsed[word] for word in given})
        return Block(name, step, arguments.get("seed") or 0)

    def apply(self, document: Document) -> Document | str:
        """Return a document as the block leaves it, or why it is left out ("" if the block does not say).

        This depends on the document alone, and not on those before it.
        """
        assert isinstance(document.text, str), "blocks take whole texts"
        if isinstance(self.step, MinhashSignature):
            return document._replace(bands=self.step.bands(document.text))
        for value in vars(self.step).values():
            if isinstance(value, PIIReplacer):
                value._replace_i = 0  # its replacements take turns, from the first one on
        if hasattr(self.step, "uniform"):  # it draws at random
            number = int.from_bytes(digest_of(document.id.encode(errors="surrogatepass")))
            self.step.uniform = default_rng([self.seed, number]).uniform
        if isinstance(self.step, BaseFormatter):
            return document._replace(text=self.step.format(document.text))
        passed = DatatroveDocument(text=document.text, id=document.id)
        kept, reason = get_filter_result(self.step.filter(passed))
        return document._replace(text=passed.text) if kept else (reason or "")


class Filters:
    """A pipeline that is ready to run. Raises what `Block.make` raises."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.blocks = [Block.make(name, arguments) for name, arguments in pipeline]

    def apply(self, document: Document, summary: Summary) -> Document | Reject:
        """Return a document as the pipeline leaves it, or a reject; `summary` counts what each block does."""
        for number, block in enumerate(self.blocks, 1):
            counts = summary.filtered(f"{number}. {block.name}")
            counts["documents"] += 1
            try:
                result = block.apply(document)
            except FAILURES as error:
                result = f"it fails on this text: {type(error).__name__}: {error}"
            if isinstance(result, Document) and not str(result.text).strip():
                result = "it leaves no text"
            if isinstance(result, str):
                counts["left out"] += 1
                return Reject(document.id, document.source, block.name, result)
            counts["changed"] += result.text != document.text
            document = result
        return document
