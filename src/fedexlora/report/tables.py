"""Tables of a report: values as they are in the records, and how a page and a file show them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from fedexlora.texts import cut, printable, size

Value = str | int | float | None
Form = Literal["text", "spread", "count", "score", "share", "error", "size", "seconds", "number"]
"""How a column's values are shown to people; a spread is a text that stands like a number."""
_LONGEST = 400
"""Characters of a cell."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column's name, and the form of its values."""

    name: str
    form: Form = "text"

    @property
    def right(self) -> bool:
        """Whether its values are numbers, which stand on the right."""
        return self.form != "text"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of values; the first column names the row."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]

    @staticmethod
    def of(columns: Sequence[Column], rows: Sequence[Sequence[Value]]) -> Table:
        """A table of any sequences."""
        return Table(tuple(columns), tuple(map(tuple, rows)))

    def shown(self, most: int | None = None) -> list[list[str]]:
        """The first ``most`` rows for people; all if not given."""
        return [
            [show(value, column.form) for value, column in zip(row, self.columns, strict=True)]
            for row in self.rows[:most]
        ]

    def to_csv(self) -> str:
        """The whole table with every digit; nothing where there is no value."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        writer.writerows([[_plain(value) for value in row] for row in self.rows])
        return out.getvalue()


def show(value: Value, form: Form) -> str:
    """A value for people.

    >>> [show(0.12345, form) for form in ("score", "share", "error", "seconds")]
    ['0.1235', '12.3 %', '1.2e-01', '0.1 s']
    >>> show(None, "score"), show(1234567, "size"), show(1234567, "count")
    ('–', '1.2 MB', '1,234,567')
    """
    if value is None:
        return "–"
    if isinstance(value, str):
        return cut(printable(value), _LONGEST)
    if not isfinite(value):
        return str(value)
    return _number(value, form)


def _number(value: float, form: Form) -> str:
    match form:
        case "score":
            return f"{value:.4f}"
        case "share":
            return _share(value)
        case "error":
            return f"{value:.1e}"
        case "size":
            return size(value)
        case "seconds":
            return f"{value:,.1f} s"
        case "count":
            return f"{value:,.0f}"
        case _:
            return f"{value:.4g}"


def _share(value: float) -> str:
    """Per cent with the digits that say something.

    >>> _share(0.0), _share(0.9999999), _share(0.00012)
    ('0 %', '100.0 %', '0.012 %')
    """
    if value == 0.0:
        return "0 %"
    return f"{value:.1%}".replace("%", " %") if abs(value) >= 1e-3 else f"{100 * value:.2g} %"


def _plain(value: Value) -> str | int | float:
    """A value in a file; a text that a spreadsheet would take for a formula is quoted as text."""
    if value is None:
        return ""
    if isinstance(value, str):
        shown = printable(value)
        return f"'{shown}" if shown[:1] in "=+-@" and shown else shown
    return value
