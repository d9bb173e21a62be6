"""Collects the sources of Python's standard library as a corpus of long documents, which every machine has."""

import gzip
import json
import sysconfig
from pathlib import Path

from rich.progress import track

from infini_train.files import atomic_file

EXCLUDED = {
    *("__pycache__", "site-packages", "dist-packages"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),  # generated tables
}


def collect_stdlib(output: Path, library: Path | None = None) -> None:
    """Write a .jsonl.gz file with a record (`id` and `text`) for each top-level package or module, sorted by name.

    The text of a package is the concatenation of its files, each after a line `# file: NAME`. Files that are not
    UTF-8 are left out. The same library always gives the same bytes; an output with these bytes is not written again.

    Args:
        output: file to write.
        library: directory of the sources; None: the standard library of this Python.

    Raises:
        ValueError: the library has no sources, or the name of `output` does not end in .jsonl.gz.
    """
    if not output.name.endswith(".jsonl.gz"):
        raise ValueError(f"output: found {output.name}, expected a name that ends in .jsonl.gz")
    library = library or Path(sysconfig.get_paths()["stdlib"])
    lines = []
    for path in track(sorted(library.iterdir()), "reading the standard library"):
        files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py")) if path.is_dir() else []
        parts = [
            f"# file: {file.relative_to(library)}\n{text}\n"
            for file in files
            if not EXCLUDED.intersection(file.relative_to(library).parts) and (text := _read(file)) is not None
        ]
        if parts:
            lines.append(json.dumps({"id": path.name.removesuffix(".py"), "text": "".join(parts)}) + "\n")
    if not lines:
        raise ValueError(f"no Python sources in {library}")
    content = gzip.compress("".join(lines).encode(), compresslevel=6, mtime=0)
    if not output.exists() or output.read_bytes() != content:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as f:
            f.write(content)
    print(f"{output}: {len(lines)} documents, {len(content):,} bytes")


def _read(file: Path) -> str | None:
    try:
        return file.read_bytes().decode("utf-8").strip() or None
    except UnicodeDecodeError:
        return None
