"""Reads a corpus without making a dataset of it, and writes the archives and lines of one."""

import io
import json
import tarfile
import zipfile
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_prep.documents import Document, DocumentReader, Reject
from data_prep.sources import find_inputs
from data_prep.summary import Summary


def read(path: Path, tasks: int = 1, **options: Any) -> tuple[list[str], dict[str, str], Summary]:
    """Return the texts of all tasks by position, the reasons by id, and the summary."""
    finding = {name: options.pop(name) for name in ("as_text", "accept") if name in options}
    options |= {name: finding[name] for name in ("as_text",) if name in finding}
    encoding = options.get("encoding")
    field = options.pop("text_field", "text")
    files = find_inputs([path], path.parent / "elsewhere", field, encoding=encoding, **finding)
    readers = [DocumentReader(files, field, options.get("id_field", "id"), n, tasks, **options) for n in range(tasks)]
    items = [
        item
        for _, item in sorted((found for reader in readers for found in reader.with_positions()), key=itemgetter(0))
    ]
    texts = [item.text for item in items if isinstance(item, Document)]
    rejects = {item.id: item.reason for item in items if isinstance(item, Reject)}
    return texts, rejects, Summary.from_json(reader.summary.to_json() for reader in readers)


def json_lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()
