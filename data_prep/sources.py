"""Finds the files of a corpus, in a fixed order, and what each of them holds."""

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from data_prep.formats import METADATA, PLAIN_TEXT, TEXT, Format, matches, recognise
from data_prep.input_files import InputFile
from infini_train.data.remote import is_remote
from infini_train.files import atomic_file

# Files that `datasets` writes beside its Arrow files.
OF_DATASETS = {"dataset_info.json", "state.json", "dataset_dict.json"}
OF_ZARR = {".zarray", ".zgroup", "zarr.json"}
EXPORT = "export its texts first, for instance with `datasets.Dataset.from_list(list({})).to_parquet(FILE)`"
STANDARD_INPUT = "-"
CONNECTIONS = 16  # files at URLs that are recognised at once
# What file systems call that which changes when a file changes.
VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "last_modified", "mtime", "created")
LISTED = 5  # files that an error names


def find_inputs(
    inputs: Sequence[Path | str],
    output: Path,
    text_field: str = "text",
    as_text: Sequence[str] = (),
    encoding: str | None = None,
    accept: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[InputFile]:
    """List the given files, and all files below the given directories except hidden ones, sorted by path.

    Symbolic links are followed. A link that is broken or part of a loop becomes a file that cannot be read.

    Args:
        inputs: files and directories, their URLs, and patterns of them; "-" is standard input, which is copied to a
            file beside `output`.
        output: what the caller will make of them.
        text_field: path of the text in a record.
        as_text: patterns of file names that hold a text each, whatever they look like.
        encoding: that of files of text, None for UTF-8, "detect" to find out for each file.
        accept: leave out files of formats that are not read, instead of raising an error.
        include: patterns of names of files to list, if there are any.
        exclude: patterns of names of files not to list.

    Raises:
        FileNotFoundError: an input does not exist.
        RuntimeError: a URL cannot be reached.
        ValueError: there are no files, `output` lies in an input, where the next run would read it, there are files
            of a format that is not read, or a package is missing.
    """
    listed: list[list[InputFile]] = []  # by input
    for given in inputs:
        files: list[InputFile] = []
        listed.append(files)
        if is_remote(given):
            files += _at_url(str(given))
        elif str(given) == STANDARD_INPUT:
            files.append(_standard_input(output))
        elif glob.has_magic(str(given)) and not Path(given).exists():
            if not (found := sorted(glob.glob(str(given), recursive=True))):
                raise FileNotFoundError(f"input {given} matches nothing")
            above = _before_pattern(Path(given).absolute()).parent
            for path in found:
                root = Path(path).absolute()
                files += _local(root, str(root.relative_to(above)), path, output)
        else:
            root = Path(given).resolve()
            files += _local(root, root.name, given, output)
    if not any(listed):
        raise ValueError(f"no files in {', '.join(map(str, inputs))}")
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(matches(file.name, [pattern]) for files in listed for file in files):
                print(f"warning: {option} {pattern!r} matches none of the files", file=sys.stderr)
    chosen = [
        [file for file in files if (not include or matches(file.name, include)) and not matches(file.name, exclude)]
        for files in listed
    ]
    if not any(chosen):
        raise ValueError(f"none of {sum(map(len, listed)):,} files is left by --include and --exclude")
    files = _named_apart(chosen)

    def recognised(file: InputFile) -> InputFile:
        if file.wrong or file.format != PLAIN_TEXT:
            return file
        try:
            with file.head() as stream:
                return replace(file, format=recognise(stream, file.name, text_field, encoding, as_text))
        except OSError as error:
            return replace(file, wrong=("unreadable", str(error)))

    if any(isinstance(file.path, str) for file in files):
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            files = list(pool.map(recognised, files))
    else:
        files = [recognised(file) for file in files]
    return _without_refused(files, accept)


def _named_apart(listed: list[list[InputFile]]) -> list[InputFile]:
    """Return the files of all inputs; where an earlier input has other files of these names, with its number before.

    Documents are known by the names of their files, so that of two directories with the same name, such as those of
    two languages, one would be left out.
    """
    paths: dict[str, Path | str] = {}
    apart: list[InputFile] = []
    for number, files in enumerate(listed, 1):
        if any(paths.get(file.name, file.path) != file.path for file in files):
            files = [replace(file, name=f"{number}:{file.name}") for file in files]
        paths |= {file.name: file.path for file in files}
        apart += files
    return apart


def _local(root: Path, name: str, given: Path | str, output: Path) -> list[InputFile]:
    """List an input on this machine, which is called `name`."""
    if output.resolve().is_relative_to(root):
        raise ValueError(f"output {output} lies in the input {given}")
    if root.is_dir():
        return sorted(_below(root, Path(name), ()), key=lambda file: file.path)
    if root.is_file():
        return [_input_file(root, name, root.stat())]
    if root.exists():
        raise ValueError(f"input {given} is neither a file nor a directory")
    raise FileNotFoundError(f"input {given} does not exist")


def _at_url(given: str) -> list[InputFile]:
    """List the files at a URL, which may be that of a directory or a pattern."""
    try:
        system, root = fsspec.core.url_to_fs(given.rstrip("/"), skip_instance_cache=True)
        if glob.has_magic(root):
            found, base = system.glob(root, detail=True), _before_pattern(PurePosixPath(root))
        else:
            about = system.info(root)
            found = system.find(root, detail=True) if about["type"] == "directory" else {root: about}
            base = PurePosixPath(root)
    except FileNotFoundError:
        raise FileNotFoundError(f"input {given} does not exist") from None
    except Exception as error:  # every file system raises errors of its own
        raise RuntimeError(f"input {given}: {type(error).__name__}: {error}") from None
    names: dict[str, set[str]] = {}  # by directory
    for path in found:
        directory, _, last = path.rpartition("/")
        names.setdefault(directory, set()).add(last)
    files, refused = [], set[str]()
    for directory, here in sorted(names.items()):
        if why := _refused_directory(here, partial(system.cat_file, f"{directory}/index.json")):
            refused.add(directory)
            called = PurePosixPath(directory).relative_to(base.parent)
            files.append(InputFile(system.unstrip_protocol(directory), str(called), 0, 0, Format(TEXT, refused=why)))
    for path, about in sorted(found.items()):
        name = PurePosixPath(path).relative_to(base.parent)
        below = PurePosixPath(path).relative_to(base).parts
        if about["type"] != "file" or any(part.startswith(".") or part == "__pycache__" for part in below):
            continue
        if refused and any(path.startswith(f"{directory}/") for directory in refused):
            continue
        if about.get("size") is None:
            raise ValueError(f"input {given}: its server does not tell the size of {path}")
        version = next((str(about[field]) for field in VERSIONS if about.get(field)), "")
        number = int.from_bytes(hashlib.sha256(version.encode()).digest()[:7])
        file = InputFile(system.unstrip_protocol(path), str(name), about["size"], number)
        is_about = name.name in OF_DATASETS and _is_of_datasets(names[path.rpartition("/")[0]])
        files.append(replace(file, format=Format(METADATA)) if is_about else file)
    if not files:
        raise FileNotFoundError(f"input {given} matches nothing")
    return files


def _before_pattern(path: Any) -> Any:
    """Return the directory above the first part of a path that is a pattern."""
    while glob.has_magic(str(path)):
        path = path.parent
    return path


def _standard_input(output: Path) -> InputFile:
    """Copy standard input to a file, which the tasks read, and which a run that continues compares by its content."""
    path = spooled(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as f:
        shutil.copyfileobj(sys.stdin.buffer, f)
    with open(path, "rb") as f:
        number = int.from_bytes(hashlib.file_digest(f, "sha256").digest()[:7])
    return InputFile(path, "stdin", path.stat().st_size, number)


def spooled(output: Path) -> Path:
    """Return the file to which standard input is copied while `output` is made."""
    output = output.resolve()
    return output.with_name(f".{output.name}.stdin")


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
    if refused := _refused_directory(names, (directory / "index.json").read_bytes):
        yield InputFile(directory, str(name), 0, 0, Format(TEXT, refused=refused))
        return
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
            is_about = entry.name in OF_DATASETS and _is_of_datasets(names)
            yield replace(file, format=Format(METADATA)) if is_about else file


def _is_of_datasets(names: set[str]) -> bool:
    """Tell whether `datasets` wrote a directory, by the names in it."""
    return "dataset_dict.json" in names or any(name.endswith(".arrow") for name in names)


def _refused_directory(names: set[str], read_index: Callable[[], bytes]) -> str | None:
    """Return what to do about a directory that is one dataset of a format that is not read.

    Args:
        names: what it holds.
        read_index: returns the content of its index.json.
    """
    if names & OF_ZARR:
        return "a Zarr store of numbers, not text"
    try:
        index = json.loads(read_index()) if "index.json" in names else None
    except (OSError, ValueError):
        return None
    if not isinstance(index, dict):
        return None
    if "tokenizer_sha256" in index:
        return "shards of tokens that infini-train made: give the texts that they were made from"
    shards = index.get("shards")
    if isinstance(shards, list) and shards and isinstance(shards[0], dict) and shards[0].get("format") == "mds":
        export = EXPORT.format("streaming.LocalDataset(DIR)")
        return f"a MosaicML dataset (MDS): give one of token ids to `prep import-tokens`; of one of texts, {export}"
    if "chunks" in index and "config" in index:
        return f"a litdata dataset: {EXPORT.format('litdata.StreamingDataset(DIR)')}"
    return None
