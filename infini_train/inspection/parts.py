"""What a section of the report consists of: tables, figures and texts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from infini_train import plots

WIDE = 7.0  # inches; as wide as a column of the page
NO_VALUE = "-"


class Table(NamedTuple):
    """A table; the first cell of a row is its header. `shades` are numbers from 0 to 1 that colour the cells."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    shades: list[list[float]] | None = None


class Figure(NamedTuple):
    """A picture with its caption and, to unfold, the tables of what it shows. A wide one takes a row of the page."""

    caption: str
    svg: Markup
    tables: list[Table]
    wide: bool


class Text(NamedTuple):
    """A text as it is, to unfold."""

    caption: str
    text: str


class Section(NamedTuple):
    """A section of the page. `more` is to unfold."""

    name: str
    title: str
    note: str
    parts: Sequence[Table | Figure | Text]
    more: Sequence[Figure] = ()


class Drawing:
    """Makes figures, and numbers them, so that their ids differ."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, drawn: Any, caption: str, *tables: Table) -> Figure:
        self.count += 1
        svg = Markup(plots.svg(drawn, f"f{self.count}", caption))
        return Figure(caption, svg, list(tables), wide=drawn.get_figwidth() > WIDE)


def cell(value: float | None) -> str:
    """Format a value of a curve."""
    return NO_VALUE if value is None else f"{value:,.6g}"
