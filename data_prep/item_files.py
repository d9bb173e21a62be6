"""Files of many small items as JSON, which tell whether they are complete.

A line is a list of up to ITEMS items, because a call of the json module takes longer than an item, and `null` is the
last line.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

ITEMS = 256  # of a line
END = b"null\n"


class ItemWriter:
    """Writes items, which are plain JSON; tuples become lists. `close` ends the list, but does not close the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._items: list[Any] = []

    def add(self, item: Any) -> None:
        self._items.append(item)
        if len(self._items) == ITEMS:
            self._write()

    def close(self) -> None:
        if self._items:
            self._write()
        self._file.write(END)

    def _write(self) -> None:
        self._file.write(json.dumps(self._items).encode() + b"\n")
        self._items = []


def read_items(path: Path, remove: Path) -> Iterator[Any]:
    """Iterate over the items of a file. Raises ValueError, which says what to `remove`, if the file has no end."""
    with open(path, "rb") as f:
        for line in f:
            try:
                items = json.loads(line)
            except ValueError:
                break
            if items is None:
                return
            yield from items
    raise ValueError(f"{path} is truncated: remove {remove} and begin again")
