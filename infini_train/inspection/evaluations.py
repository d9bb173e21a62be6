"""Reads the JSON files of `infini-train evaluate segments`, `recall` and `passkey`, and finds those in a run."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from infini_train.run_files import read_json

SEGMENTS, RECALL, PASSKEY = "segments", "recall", "passkey"
MODES = ("on", "off", "other")  # whose memory is read


def with_errors(*names: str) -> list[str]:
    """Return these names of fields, each followed by that of its standard error."""
    return [field for name in names for field in (name, f"{name}_se")]


# The field of a file that tells its kind, and the numbers in each of its rows.
FIELDS = {
    SEGMENTS: ("segments", ("tokens", *with_errors(*MODES, "off_minus_on", "other_minus_on"))),
    RECALL: ("accuracy", ("answers", *with_errors(*MODES))),
    PASSKEY: ("cells", ("tokens", "depth", "right", "local")),
}
EXPECTED = "expected what `infini-train evaluate segments`, `recall` or `passkey` wrote with --out"


class Evaluation(NamedTuple):
    """The results of an evaluation.

    Attributes:
        path: the JSON file.
        kind: SEGMENTS, RECALL or PASSKEY.
        content: what it holds.
    """

    path: Path
    kind: str
    content: dict[str, Any]


def read_evaluation(path: Path) -> Evaluation | None:
    """Read a JSON file, and return the evaluation in it, or None if it is of another kind.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or an evaluation with fields missing or of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {EXPECTED}")
    content = read_json(path)
    kinds = [kind for kind, (field, _) in FIELDS.items() if isinstance(content, dict) and field in content]
    if len(kinds) != 1 or "dataset" not in content:
        return None
    (kind,) = kinds
    if fault := _fault(kind, content):
        raise ValueError(f"{path}: {fault}; {EXPECTED}")
    return Evaluation(path, kind, content)


def evaluations_of(run: Path) -> list[Evaluation]:
    """Read the evaluations that lie in a run's directory; a file that cannot be read is reported on stderr."""
    found = []
    for path in sorted(run.glob("*.json")):
        try:
            evaluation = read_evaluation(path)
        except (OSError, ValueError) as error:
            print(f"infini-train report: warning: left out {error}", file=sys.stderr)
            continue
        if evaluation is not None:
            found.append(evaluation)
    return found


def given_evaluation(path: Path) -> Evaluation:
    """Read an evaluation that the user named. Raises FileNotFoundError or ValueError if it is none."""
    evaluation = read_evaluation(path)
    if evaluation is None:
        raise ValueError(f"{path}: found other content; {EXPECTED}")
    return evaluation


def _fault(kind: str, content: dict[str, Any]) -> str | None:
    """Return what is wrong with an evaluation's fields, or None."""
    field, numbers = FIELDS[kind]
    tables = content[field] if kind == RECALL else {field: content[field]}
    if not isinstance(tables, dict) or not tables:
        return f"{field}: found no tables"
    for name, rows in tables.items():
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            return f"{field}: {name}: found no rows"
        for row in rows:
            wrong = [name for name in numbers if not _is_right(name, row.get(name, ""), kind)]
            if kind != PASSKEY and not isinstance(row.get("segment"), str):
                wrong.append("segment")
            if wrong:
                return f"{field}: {name}: found a row without {', '.join(wrong)}"
    if kind == RECALL and not _is_number(content.get("chance")):
        return "chance: found no number"
    if kind == PASSKEY:
        places = {(cell["tokens"], cell["depth"]) for cell in content[field]}
        if len(places) != len({tokens for tokens, _ in places}) * len({depth for _, depth in places}):
            return "cells: found some lengths without some depths"
    if kind == SEGMENTS and content.get("heads") is not None and not _are_heads(content["heads"]):
        return "heads: found no share and read_norm of equal size"
    return None


def _is_right(name: str, value: Any, kind: str) -> bool:
    """Return whether this is a value that a field can have. Where nothing was compared, the evaluation wrote None."""
    unknown = value is None and (name.endswith("_se") or (kind == SEGMENTS and name.startswith("other")))
    return unknown or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _are_heads(heads: Any) -> bool:
    """Return whether this is a dictionary of `share` and `read_norm`, each numbers [layers, heads]."""
    if not isinstance(heads, dict) or set(heads) != {"share", "read_norm"}:
        return False
    tables = list(heads.values())
    if not all(isinstance(table, list) and table and all(isinstance(row, list) for row in table) for table in tables):
        return False
    sizes = {tuple(map(len, table)) for table in tables}
    numbers = [value for table in tables for row in table for value in row]
    return len(sizes) == 1 and len(set(*sizes)) == 1 and bool(numbers) and all(map(_is_number, numbers))
