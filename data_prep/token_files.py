"""Finds files of token ids that other programs wrote, and recognises by content what each is."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.mds import is_mds, mds_files
from infini_train.data.remote import is_remote

MEGATRON, LLM_C, RAW, NUMPY, DATATROVE, MDS, PARQUET = (
    "Megatron",
    "llm.c",
    "ids alone",
    "NumPy",
    "datatrove",
    "MDS",
    "Parquet",
)
MEGATRON_MAGIC, NUMPY_MAGIC, PARQUET_MAGIC = b"MMIDIDX\0\0", b"\x93NUMPY", b"PAR1"
LLM_C_DTYPES = {20240520: "<u2", 20240801: "<u4"}  # by the first number of the header
LLM_C_EVALUATION = 20240522


@dataclass(frozen=True)
class TokenFile:
    """A file of ids, or a directory of them that is one dataset (MDS)."""

    path: Path
    name: str  # path relative to the parent of the given input
    kind: str
    index: Path | None = None  # the file beside it that says where documents end

    @property
    def has_borders(self) -> bool:
        """Whether the format says where documents begin and end; otherwise only EOS does."""
        return self.index is not None or self.kind in (MDS, PARQUET)

    @property
    def files(self) -> list[Path]:
        """All files that it consists of."""
        if self.kind == MDS:
            return mds_files(self.path)
        return [self.path] if self.index is None else [self.path, self.index]


def find_token_files(inputs: Sequence[Path | str], output: Path) -> tuple[list[TokenFile], list[str]]:
    """List the given files, and all files of ids below the given directories except hidden ones, sorted by path.

    Args:
        inputs: files, directories and patterns of them.
        output: what the caller will make of them.

    Returns:
        The files, and the names of other files in these directories, which are not read.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: there are no such files, a given file is none, or `output` lies in an input.
    """
    found: list[TokenFile] = []
    others: list[str] = []
    for given in inputs:
        if is_remote(given):
            raise ValueError(f"inputs: found {given}, expected files on this machine: copy them here first")
        is_pattern = glob.has_magic(str(given)) and not Path(given).exists()
        paths = (
            [Path(path) for path in sorted(glob.glob(str(given), recursive=True))] if is_pattern else [Path(given)]
        )
        if not paths:
            raise FileNotFoundError(f"input {given} matches nothing")
        for path in paths:
            root = path.resolve()
            if not root.exists():
                raise FileNotFoundError(f"input {path} does not exist")
            if output.resolve().is_relative_to(root):
                raise ValueError(f"output {output} lies in the input {path}")
            if root.is_dir():
                below = _below(root)
                found += [file for file in below if isinstance(file, TokenFile)]
                others += [file for file in below if isinstance(file, str)]
            elif file := _recognised(root, root.name):
                found.append(file)
            elif not (is_pattern and _is_index(root)):
                raise ValueError(
                    f"{path}: found no file of ids that is read, expected .bin (of Megatron, llm.c or nanoGPT), "
                    ".npy, .ds, .parquet or the directory of an MDS dataset"
                )
    if not found:
        raise ValueError(f"no files of token ids in {', '.join(map(str, inputs))}")
    for path, times in Counter(file.path for file in found).items():
        if times > 1:
            raise ValueError(f"inputs: found {path} {times} times, expected it once")
    return found, others


def _below(root: Path) -> list[TokenFile | str]:
    """List the files of ids below a directory, and the names of others."""
    listed: list[TokenFile | str] = []
    for directory, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        here = Path(directory)
        label = root.name / here.relative_to(root)
        within_mds: set[Path] = set()
        if is_mds(here):
            within_mds = {here / "index.json", *mds_files(here)}
            listed.append(TokenFile(here, str(label), MDS))
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or path in within_mds or _is_index(path):
                continue
            listed.append(_recognised(path, str(label / name)) or str(label / name))
    return listed


def _is_index(path: Path) -> bool:
    """Tell whether a file belongs to a file of ids beside it."""
    name = path.name
    for suffix, of in ((".idx", ".bin"), (".csv.gz", ".npy"), (".index", ""), (".metadata", ""), (".loss", "")):
        if name.endswith(suffix) and (of or name.removesuffix(suffix).endswith(".ds")):
            return path.with_name(name.removesuffix(suffix) + of).exists()
    return False


def _recognised(path: Path, name: str) -> TokenFile | None:
    """Return what a file is, None if it holds no ids."""
    with open(path, "rb") as f:
        head = f.read(16)
    number = int.from_bytes(head[:4], "little")
    suffix = path.suffix.lower()
    if head.startswith(PARQUET_MAGIC):
        return TokenFile(path, name, PARQUET)
    if head.startswith(NUMPY_MAGIC):
        return TokenFile(path, name, NUMPY)
    if suffix == ".bin":
        if (index := path.with_suffix(".idx")).exists():
            return TokenFile(path, name, MEGATRON, index)
        if number == LLM_C_EVALUATION:
            raise ValueError(f"{name}: found llm.c's examples of an evaluation, expected its tokens for training")
        return TokenFile(path, name, LLM_C if number in LLM_C_DTYPES else RAW)
    for kind, of, beside in ((RAW, ".npy", ".csv.gz"), (DATATROVE, ".ds", ".ds.index")):
        if suffix == of:
            index = path.with_suffix(beside)
            return TokenFile(path, name, kind, index if index.exists() else None)
    return None
