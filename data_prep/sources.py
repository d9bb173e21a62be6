"""Finds the files of a corpus, in a fixed order, and what each of them holds."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.formats import METADATA, PLAIN_TEXT, TEXT, Format, recognise

# Files that `datasets` writes beside its Arrow files.
OF_DATASETS = {"dataset_info.json", "state.json", "dataset_dict.json"}
OF_ZARR = {".zarray", ".zgroup", "zarr.json"}
EXPORT = "export its texts first, for instance with `datasets.Dataset.from_list(list({})).to_parquet(FILE)`"
LISTED = 5  # files that an error names


@dataclass(frozen=True)
class InputFile:
    """A file to read."""

    path: Path
    name: str  # path relative to the parent of the given input, so that it does not depend on where the input lies
    size: int
    mtime_ns: int
    format: Format = PLAIN_TEXT
    wrong: tuple[str, str] | None = None  # reason and detail of a Reject, if the file is known to be unreadable

    def open(self) -> BinaryIO:
        """Open the file. Raises RuntimeError if it has another size than when it was found."""
        stream = open(self.path, "rb")  # noqa: SIM115  the caller closes it
        # Tasks divide the work by the sizes that were found at first, so files must not change meanwhile.
        if (found := os.fstat(stream.fileno()).st_size) != self.size:
            stream.close()
            raise RuntimeError(f"{self.path} has changed: found {found:,} bytes, expected {self.size:,}")
        return stream


def find_inputs(
    inputs: Sequence[Path],
    output: Path,
    text_field: str = "text",
    as_text: Sequence[str] = (),
    encoding: str | None = None,
    accept: bool = False,
) -> list[InputFile]:
    """List the given files, and all files below the given directories except hidden ones, sorted by path.

    Symbolic links are followed. A link that is broken or part of a loop becomes a file that cannot be read.

    Args:
        inputs: files and directories.
        output: what the caller will make of them.
        text_field: path of the text in a record.
        as_text: patterns of file names that hold a text each, whatever they look like.
        encoding: that of files of text, None for UTF-8, "detect" to find out for each file.
        accept: leave out files of formats that are not read, instead of raising an error.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: there are no files, `output` lies in an input, where the next run would read it, there are files
            of a format that is not read, or a package is missing.
    """
    files: list[InputFile] = []
    for given in inputs:
        root = given.resolve()
        if output.resolve().is_relative_to(root):
            raise ValueError(f"output {output} lies in the input {given}")
        if root.is_dir():
            files += sorted(_below(root, Path(root.name), ()), key=lambda file: file.path)
        elif root.is_file():
            files.append(_input_file(root, root.name, root.stat()))
        elif root.exists():
            raise ValueError(f"input {given} is neither a file nor a directory")
        else:
            raise FileNotFoundError(f"input {given} does not exist")
    if not files:
        raise ValueError(f"no files in {', '.join(map(str, inputs))}")

    def recognised(file: InputFile) -> InputFile:
        if file.wrong or file.format != PLAIN_TEXT:
            return file
        try:
            with file.open() as stream:
                found = recognise(stream, file.name, text_field, encoding)
        except OSError as error:
            return replace(file, wrong=("unreadable", str(error)))
        if any(fnmatch(file.name, pattern) or fnmatch(file.path.name, pattern) for pattern in as_text):
            found = replace(found, kind=TEXT, refused=None)
        return replace(file, format=found)

    files = [recognised(file) for file in files]
    return _without_refused(files, accept)


def _without_refused(files: list[InputFile], accept: bool) -> list[InputFile]:
    """Mark the files of formats that are not read as unreadable, or raise ValueError."""
    refused = [file for file in files if file.format.refused]
    if refused and not accept:
        lines = [f"  {file.name}: {file.format.refused}" for file in refused[:LISTED]]
        more = [f"  and {len(refused) - LISTED:,} more"] if len(refused) > LISTED else []
        raise ValueError(
            "\n".join(["these inputs cannot be read as documents:", *lines, *more])
            + "\nremove them, give --accept to leave them out, or --as_text PATTERN for texts among them"
        )
    return [replace(file, wrong=("not_read", file.format.refused)) if file.format.refused else file for file in files]


def _input_file(path: Path, name: str, status: os.stat_result) -> InputFile:
    return InputFile(path, name, status.st_size, status.st_mtime_ns)


def _below(directory: Path, name: Path, above: tuple[tuple[int, int], ...]) -> Iterator[InputFile]:
    """Find all files below a directory; `above` holds device and inode of its parents, to detect link loops."""
    try:
        status = directory.stat()
        if (status.st_dev, status.st_ino) in above:
            wrong = "symlink_loop", f"leads to {directory.resolve()}"
            yield InputFile(directory, str(name), 0, 0, wrong=wrong)
            return
        entries = list(os.scandir(directory))
    except OSError as error:
        yield InputFile(directory, str(name), 0, 0, wrong=("unreadable", str(error)))
        return
    names = {entry.name for entry in entries}
    if refused := _refused_directory(directory, names):
        yield InputFile(directory, str(name), 0, 0, Format(TEXT, refused=refused))
        return
    of_datasets = "dataset_dict.json" in names or any(name.endswith(".arrow") for name in names)
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        path, below = directory / entry.name, name / entry.name
        try:
            found = path.stat()
        except OSError as error:
            reason = "symlink_loop" if error.errno == errno.ELOOP else "unreadable"
            yield InputFile(path, str(below), 0, 0, wrong=(reason, str(error)))
            continue
        if stat.S_ISDIR(found.st_mode):
            yield from _below(path, below, (*above, (status.st_dev, status.st_ino)))
        elif stat.S_ISREG(found.st_mode):
            file = _input_file(path, str(below), found)
            yield replace(file, format=Format(METADATA)) if of_datasets and entry.name in OF_DATASETS else file


def _refused_directory(directory: Path, names: set[str]) -> str | None:
    """Return what to do about a directory that is one dataset of a format that is not read."""
    if names & OF_ZARR:
        return "a Zarr store of numbers, not text"
    try:
        index = json.loads((directory / "index.json").read_bytes()) if "index.json" in names else None
    except (OSError, ValueError):
        return None
    if not isinstance(index, dict):
        return None
    if "tokenizer_sha256" in index:
        return "shards of tokens that infini-train made: give the texts that they were made from"
    shards = index.get("shards")
    if isinstance(shards, list) and shards and isinstance(shards[0], dict) and shards[0].get("format") == "mds":
        return f"a MosaicML dataset (MDS): {EXPORT.format('streaming.LocalDataset(DIR)')}"
    if "chunks" in index and "config" in index:
        return f"a litdata dataset: {EXPORT.format('litdata.StreamingDataset(DIR)')}"
    return None


def fingerprint_inputs(files: list[InputFile]) -> str:
    """Return a hexadecimal sha256 of names, sizes and modification times, which identifies the inputs of a run."""
    stats = [(file.name, file.size, file.mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def inputs_to_json(files: list[InputFile]) -> bytes:
    """Serialise files, one line of JSON for each; `load_inputs` reads them back."""
    return b"".join(json.dumps(asdict(file) | {"path": str(file.path)}).encode() + b"\n" for file in files)


def load_inputs(path: Path) -> list[InputFile]:
    """Read a file that `inputs_to_json` wrote. Raises ValueError if another version wrote it."""
    try:
        with open(path, "rb") as f:
            return [_from_json(json.loads(line)) for line in f]
    except (KeyError, TypeError):
        raise ValueError(f"{path} was written by another version: remove {path.parent} and begin again") from None


def _from_json(line: dict[str, Any]) -> InputFile:
    layers = tuple(line["format"]["layers"])
    wrong = line["wrong"] and tuple(line["wrong"])
    found = Format(**line["format"] | {"layers": layers})
    return InputFile(**line | {"path": Path(line["path"]), "format": found, "wrong": wrong})
