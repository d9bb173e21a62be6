"""Counts by kind what was read of a corpus and how much of it became text, so that nothing is misread silently."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.formats import LIKE_RECORDS, MARKUP, METADATA, TEXT

LEAST_SHARE = 0.2  # of the bytes that were read; JSON that escapes all letters of a text is 3 times as large as it
SMALL_KIND = 0.01  # share of all bytes below which a kind of file is not checked on its own


@dataclass
class Summary:
    """Counts of a task, or of all tasks.

    Attributes:
        kinds: by kind of file, the numbers of files, bytes, documents and text_bytes. Bytes are those of uncompressed
            content, and the members of an archive count as files.
        changes: number of documents that were changed, by what was changed.
        fields: number of records, and of those that have the field that `id_field` or `join` names.
        filters: by block of the pipeline (filtering.py), the numbers of documents that reached it, and of those that
            it left out and changed.
    """

    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    filters: dict[str, Counter[str]] = field(default_factory=dict)

    counts_bytes = True  # False while a file is read whose bytes another task counts

    def begin(self, kind: str) -> None:
        """Count a file or member; what is added from now on belongs to its kind."""
        self.kind = kind
        self.kinds.setdefault(kind, Counter())["files"] += self.counts_bytes

    def add(self, what: str, count: int) -> None:
        """Add to the counts of the current kind."""
        if self.counts_bytes or what != "bytes":
            self.kinds[self.kind][what] += count

    def filtered(self, block: str) -> Counter[str]:
        """Return the counts of a block of the pipeline."""
        return self.filters.setdefault(block, Counter())

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain JSON; `from_json` reads them back."""
        kinds = {kind: dict(counts) for kind, counts in self.kinds.items()}
        filters = {block: dict(counts) for block, counts in self.filters.items()}
        return {"kinds": kinds, "changes": dict(self.changes), "fields": dict(self.fields), "filters": filters}

    @staticmethod
    def from_json(parts: Iterable[dict[str, Any]]) -> "Summary":
        """Return the sums of several summaries."""
        total = Summary()
        for part in parts:
            for kind, counts in part["kinds"].items():
                total.kinds.setdefault(kind, Counter()).update(counts)
            total.changes.update(part["changes"])
            total.fields.update(part["fields"])
            for block, counts in part.get("filters", {}).items():
                total.filtered(block).update(counts)
        return total

    def lines(self) -> list[str]:
        """Return the summary for people, a table and what else they must know."""
        rows: list[tuple[str, ...]] = [("read", "files", "bytes", "documents", "became text")]
        for kind, counts in sorted(self.kinds.items()):
            numbers = (f"{counts[what]:,}" for what in ("files", "bytes", "documents"))
            rows.append((kind, *numbers, f"{_share(counts):.1%}" if counts["bytes"] else "-"))
        lines = _table(rows)
        if self.filters:
            columns = ("documents", "left out", "changed")
            blocks = sorted(self.filters.items(), key=lambda item: int(item[0].split(".")[0]))
            lines += _table(
                [
                    ("filter", *columns),
                    *((block, *(f"{counts[what]:,}" for what in columns)) for block, counts in blocks),
                ]
            )
        if self.changes:
            changes = ", ".join(f"{what} in {count:,}" for what, count in sorted(self.changes.items()))
            lines.append(f"documents whose characters were changed: {changes} (see --unicode_form and --line_ends)")
        for kind, told in (
            (MARKUP, "markup (HTML, XML), kept with all their tags"),
            (LIKE_RECORDS, "many records (rows of a table, lines of values), each kept as one text"),
        ):
            if found := sum(counts["documents"] for name, counts in self.kinds.items() if kind in name):
                lines.append(f"documents that look like {told}: {found:,}")
        return lines

    def fault(self) -> str | None:
        """Return what is wrong if so little became text that the corpus was probably misread, None otherwise."""
        total = sum(self.kinds.values(), Counter[str]())
        if total["bytes"] and _share(total) < LEAST_SHARE:
            return _fault("all inputs", total)
        for kind, counts in sorted(self.kinds.items()):
            # Of texts, what does not become text is in rejects.jsonl, file by file.
            checked = kind.split(": ")[-1].split(" (")[0] not in (TEXT, METADATA)
            if checked and counts["bytes"] > SMALL_KIND * total["bytes"] and _share(counts) < LEAST_SHARE:
                return _fault(kind, counts)
        return None


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align rows of cells, of which the first is a name and the others are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _share(counts: Counter[str]) -> float:
    return counts["text_bytes"] / counts["bytes"]


def _fault(what: str, counts: Counter[str]) -> str:
    return (
        f"{what}: {counts['text_bytes']:,} of {counts['bytes']:,} bytes became text ({_share(counts):.1%}), expected "
        f"at least {LEAST_SHARE:.0%}: name the field of the text by --text_field, name files that are texts by "
        "--as_text, or give --accept to continue"
    )
