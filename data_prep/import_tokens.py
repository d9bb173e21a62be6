"""Makes a dataset of documents that another program tokenised: cuts, checks and samples them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.finished import is_finished
from data_prep.input_files import InputFile, fingerprint_inputs
from data_prep.parallel import progress_bar
from data_prep.split import check_fractions, split_options
from data_prep.token_files import TokenFile, find_token_files
from data_prep.token_rows import Ids, Reading, read_rows
from data_prep.writing import TokenisedDocument, write_datasets
from infini_train.data.index import SPECIAL_TOKENS
from infini_train.files import new_directory
from infini_train.tokenizer.loading import Tokenizer, load_tokenizer

Borders = Literal["index", "eos"]

BLOCK_TOKENS = 1 << 20  # ids that are checked and converted at once
SAMPLED_FILES, SAMPLED_DOCUMENTS, SAMPLED_TOKENS = 8, 4, 256  # files, documents of a file and ids of a document
SHOWN_CHARACTERS = 200
# Of the sampled ids with those that the tokenizer gives for their text: 100% with the right one, and with another
# 62% to 90%, from Mistral's seven tokenizers on English and Python.
LEAST_AGREEMENT = 0.95
LISTED = 5  # files that the summary names


def import_tokens(
    inputs: Sequence[Path | str],
    output: Path,
    tokenizer_path: Path,
    *,
    validation_fraction: float = 0.0,
    test_fraction: float = 0.0,
    shard_tokens: int = 50_000_000,
    eos_id: int | None = None,
    borders: Borders | None = None,
    dtype: str | None = None,
    tokens_field: str | None = None,
    accept: bool = False,
    overwrite: bool = False,
) -> None:
    """Make the dataset `output`, or `output`/train and those held out, of files of token ids.

    Documents keep the order of the files and become `BOS tokens EOS`; BOS and EOS that a document has at its ends are
    not doubled. No document is left out except those without tokens, also no duplicate. `output` appears only when it
    is complete and on disk; a second run with the same options leaves it as it is.

    Args:
        inputs: files, directories and patterns of them (see `find_token_files`).
        output: dataset directory to make.
        tokenizer_path: the tokenizer that made the ids, as `load_tokenizer` takes it.
        validation_fraction: as in `shard_corpus`, as are the following two.
        test_fraction: share of documents in `output`/test.
        shard_tokens: approximate tokens of a shard.
        eos_id: the id after (or before) each document in the files, None for EOS of the tokenizer.
        borders: "index": documents end where the files' format says; "eos": all ids are one stream, also across
            files, and documents end at `eos_id`. None: the former for formats that say it, else the latter, and it is
            an error if there is BOS or EOS inside a document, or no EOS in a file.
        dtype: type of ids of which the format does not tell it, None to guess it.
        tokens_field: column of the ids in Parquet and MDS, None for `input_ids` or `tokens`.
        accept: make a dataset even if the tokenizer does not seem to be that of the ids.
        overwrite: replace an output that was made with other options.

    Raises:
        FileNotFoundError: an input or the tokenizer does not exist.
        ValueError: a file is damaged or has other ids than the tokenizer, an option is out of range, or `output`
            holds anything else.
    """
    check_fractions(validation_fraction, test_fraction)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: found {shard_tokens}, expected at least 1")
    tokenizer = load_tokenizer(tokenizer_path)
    if eos_id is not None and not 0 <= eos_id < tokenizer.vocab_size:
        raise ValueError(f"eos_id: found {eos_id}, expected an id from 0 to {tokenizer.vocab_size - 1}")
    files, others = find_token_files(inputs, output)
    if borders == "index" and (without := next((file for file in files if not file.has_borders), None)):
        raise ValueError(
            f"{without.name}: its format ({without.kind}) does not say where documents end: --borders eos"
        )
    given = {"eos_id of the files": eos_id, "borders": borders, "dtype": dtype, "tokens_field": tokens_field}
    options: dict[str, Any] = {
        "inputs": fingerprint_inputs([_described(file, path) for file in files for path in file.files]),
        "tokenizer_sha256": tokenizer.sha256,
        **split_options(validation_fraction, test_fraction),
        "shard_tokens": shard_tokens,
        "imported": sorted({file.kind for file in files}),
        **{name: value for name, value in given.items() if value is not None},
    }
    if is_finished(output, options | {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}, overwrite):
        print(f"{output} exists and was made with the same options: nothing to do")
        return
    reading = Reading(tokenizer.vocab_size, dtype, tokens_field)
    importer = Importer(files, reading, tokenizer, tokenizer.eos_id if eos_id is None else eos_id, borders)
    print(importer.sample(accept))
    with progress_bar() as progress, new_directory(output, replace=True) as directory:
        task = progress.add_task("importing", total=len(files), note="")

        def shown(number: int, tokens: int) -> None:
            progress.update(task, completed=number, note=f"{tokens:,} tokens")

        indexes = write_datasets(directory, importer.documents(shown), tokenizer, options)
    print("\n".join(importer.summary_lines(others)))
    for part, index in indexes.items():
        print(f"{output / part}: {index.size}")


def _described(file: TokenFile, path: Path) -> InputFile:
    status = path.stat()
    name = file.name if path == file.path else f"{file.name}: {path.name}"
    return InputFile(path, name, status.st_size, status.st_mtime_ns)


@dataclass
class Imported:
    """One document of the files, as it is there."""

    file: TokenFile  # in which it begins
    number: int  # among those that begin in this file, from 1
    parts: list[Ids] = field(default_factory=list)  # several if it goes on in the next file

    @property
    def id(self) -> str:
        return f"{self.file.name}:{self.number}"


class Importer:
    """Reads the documents of files of ids.

    Args:
        files: the files, in order.
        reading: how they are read.
        tokenizer: the tokenizer that made the ids.
        separator: the id between documents.
        borders: as in `import_tokens`.
    """

    def __init__(
        self, files: list[TokenFile], reading: Reading, tokenizer: Tokenizer, separator: int, borders: Borders | None
    ) -> None:
        self.files, self.reading, self.tokenizer = files, reading, tokenizer
        self.separator, self.borders = separator, borders
        self.special = sorted({separator, tokenizer.bos_id, tokenizer.eos_id})
        # By kind of file, the numbers of files, documents and tokens; and what else there is to tell.
        self.counts: dict[str, Counter[str]] = {}
        self.empty, self.inside = 0, 0

    def documents(self, progress: Callable[[int, int], None]) -> Iterator[TokenisedDocument]:
        """Iterate over all documents that have tokens. Their ids are checked when their data is read.

        Args:
            progress: is told, now and then, the number of files that were read, and of tokens.
        """
        self.empty, tokens, number = 0, 0, 0
        at = {file: number for number, file in enumerate(self.files)}
        self.counts = {file.kind: Counter() for file in self.files}
        for file in self.files:
            self.counts[file.kind]["files"] += 1
        for number, document in enumerate(self._imported(self.files)):
            if number % 1000 == 0:
                progress(at[document.file], tokens)
            parts = self._content(document.parts)
            count = sum(len(part.ids) for part in parts)
            if not count:
                self.empty += 1
                continue
            tokens += count
            self.counts[document.file.kind].update(documents=1, tokens=count)
            yield TokenisedDocument(document.id, document.file.name, self._data(parts), count + SPECIAL_TOKENS)
        if not tokens:
            raise ValueError(
                f"found no document with tokens in {', '.join(file.name for file in self.files[:LISTED])}"
            )
        progress(len(self.files), tokens)

    def sample(self, accept: bool) -> str:
        """Decode some documents, to see whether the tokenizer is that of the ids.

        Args:
            accept: only tell if it does not seem to be.

        Returns:
            One of the texts, and how many of the ids encoding the texts gives again.

        Raises:
            ValueError: encoding gives less than LEAST_AGREEMENT of the ids.
        """
        same, total, shown = 0.0, 0, ""
        step = -(-len(self.files) // SAMPLED_FILES)
        for file in self.files[::step]:
            for document in islice(self._imported([file], strict=False), SAMPLED_DOCUMENTS):
                for part in self._content(document.parts)[:1]:
                    part = part.part(0, SAMPLED_TOKENS)
                    self._check(part)
                    text = self.tokenizer.decode(part.ids.astype(self.tokenizer.dtype))
                    again = self.tokenizer.encode(text)[1:-1].tolist()
                    match = SequenceMatcher(None, part.ids.tolist(), again, autojunk=False)
                    same, total = same + match.ratio() * len(part.ids), total + len(part.ids)
                    shown = shown or f"{document.id} begins {text[:SHOWN_CHARACTERS]!r}"
        agreement = same / total if total else 1.0
        told = f"{shown}\nencoding the decoded samples again gives {agreement:.1%} of their {total:,} ids"
        if agreement < LEAST_AGREEMENT and not accept:
            raise ValueError(
                f"{told}, expected at least {LEAST_AGREEMENT:.0%}: the ids were probably made with another tokenizer "
                "than --tokenizer, or are read with the wrong --dtype; --accept continues"
            )
        return told

    def summary_lines(self, others: Sequence[str]) -> list[str]:
        """Return what was read, when all documents were; `others` are files that are not read."""
        lines = [
            f"{kind}: {counts['files']:,} files, {counts['documents']:,} documents, {counts['tokens']:,} tokens "
            "without BOS and EOS"
            for kind, counts in sorted(self.counts.items())
        ]
        if self.empty:
            lines.append(f"left out: {self.empty:,} documents without tokens")
        if self.inside:
            lines.append(f"BOS or EOS inside of documents, kept: {self.inside:,}")
        if others:
            named = ", ".join(others[:LISTED]) + (", ..." if len(others) > LISTED else "")
            lines.append(f"not read, because they hold no ids: {len(others):,} files ({named})")
        return lines

    def _imported(self, files: Sequence[TokenFile], strict: bool = True) -> Iterator[Imported]:
        """Cut files into documents; `strict` raises ValueError for a file that should hold EOS and does not."""
        open_document: Imported | None = None  # which goes on in the next file
        for file in files:
            number = 0
            has_borders = file.has_borders and self.borders != "eos"
            if has_borders and open_document:
                yield open_document
                open_document = None
            has_end = open_document is not None  # that of a document which began before
            for row in read_rows(file, self.reading):
                if has_borders:
                    number += 1
                    yield Imported(file, number, [row])
                    continue
                for part, ends in self._cut(row):
                    if open_document is None:
                        number += 1
                        open_document = Imported(file, number)
                    open_document.parts.append(part)
                    if ends:
                        has_end = True
                        yield open_document
                        open_document = None
            if strict and not has_borders and not has_end and self.borders is None:
                raise ValueError(
                    f"{file.name}: found no EOS ({self.separator}), which separates documents: --eos_id names "
                    "another id, and with --borders eos a file may be, or belong to, one long document"
                )
        if open_document:
            yield open_document

    def _cut(self, row: Ids) -> Iterator[tuple[Ids, bool]]:
        """Cut ids after each separator; yield the parts, and whether the separator ends them."""
        begin = 0
        for start in range(0, len(row.ids), BLOCK_TOKENS):
            for end in np.flatnonzero(row.ids[start : start + BLOCK_TOKENS] == self.separator).tolist():
                yield row.part(begin, start + end + 1), True
                begin = start + end + 1
        if begin < len(row.ids):
            yield row.part(begin, len(row.ids)), False

    def _content(self, parts: list[Ids]) -> list[Ids]:
        """Return a document without BOS and EOS at its ends."""
        found = list(parts)
        while found:
            ids = found[0].ids
            if not (first := next((i for i in range(len(ids)) if ids[i] not in self.special), len(ids))):
                break
            found[0] = found[0].part(first, len(ids))
            if len(found[0].ids):
                break
            del found[0]
        while found:
            ids = found[-1].ids
            last = next((i for i in range(len(ids), 0, -1) if ids[i - 1] not in self.special), 0)
            if last:
                found[-1] = found[-1].part(0, last)
                break
            del found[-1]
        return found

    def _data(self, parts: list[Ids]) -> Iterator[bytes]:
        """Yield the bytes of a document. Raises ValueError for ids that cannot be part of it."""
        dtype = np.dtype(self.tokenizer.dtype).newbyteorder("<")
        yield np.array([self.tokenizer.bos_id], dtype).tobytes()
        for part in parts:
            for start in range(0, len(part.ids), BLOCK_TOKENS):
                block = part.part(start, start + BLOCK_TOKENS)
                self._check(block)
                special = np.isin(block.ids, self.special)
                if self.borders is None and special.any():
                    self._raise_inside(block, int(special.argmax()))
                self.inside += int(special.sum())
                yield block.ids.astype(dtype).tobytes()
        yield np.array([self.tokenizer.eos_id], dtype).tobytes()

    def _check(self, part: Ids) -> None:
        """Raise ValueError if the tokenizer does not have all ids of a part."""
        ids = part.ids
        wrong = (ids < 0) | (ids >= self.tokenizer.vocab_size)
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                f"{part.where(first)}: found id {ids[first]}, expected one of the {self.tokenizer.vocab_size:,} of "
                f"{self.tokenizer.path}: it did not make these ids, or they are not of the type {ids.dtype.name}"
            )

    def _raise_inside(self, part: Ids, position: int) -> None:
        found = int(part.ids[position])
        names = {self.tokenizer.bos_id: "BOS", self.tokenizer.eos_id: "EOS"} | {self.separator: "EOS"}
        raise ValueError(
            f"{part.where(position)}: found {names[found]} ({found}) inside a document: if rows of several documents "
            f"were packed, --borders eos cuts them, and --eos_id {found} cuts at this id; --borders index keeps the "
            "documents that the files' format tells, with such ids in them"
        )
