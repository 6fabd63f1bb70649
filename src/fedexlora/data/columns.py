"""Rows of text files by column; values keep the type that they are written in."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from fedexlora.errors import DataError

_KINDS: Mapping[type, str] = {
    str: "text",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
_INT64 = range(-(2**63), 2**63)

Row: TypeAlias = Mapping[str, Any]


@dataclass(slots=True)
class Columns:
    """The rows of one split's files, in order."""

    rows: int = 0
    values: dict[str, list[Any]] = field(default_factory=dict)
    """By column, one value a row; None where a row has none."""
    starts: list[tuple[int, Path]] = field(default_factory=list)
    """The first row of each file, from 0."""

    def begin(self, path: Path) -> None:
        """What is added from now on is of this file."""
        self.starts.append((self.rows, path))

    def add_row(self, row: Row) -> None:
        """One more row."""
        if not row.keys() <= self.values.keys():
            for name in (x for x in row if x not in self.values):
                self.values[name] = [None] * self.rows
        for name, column in self.values.items():
            column.append(row.get(name))
        self.rows += 1

    def add_columns(self, columns: Mapping[str, Sequence[Any]], count: int) -> None:
        """``count`` more rows."""
        for name in (x for x in columns if x not in self.values):
            self.values[name] = [None] * self.rows
        for name, column in self.values.items():
            column.extend(columns.get(name, [None] * count))
        self.rows += count

    def table(self) -> pa.Table:
        """The rows as a table; the columns are emptied.

        Raises:
            DataError: naming every column whose values are of several kinds, and the row.
        """
        arrays, faults = {}, []
        for name in list(self.values):
            values = self.values.pop(name)
            try:
                arrays[name] = pa.array(values)
            except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
                faults.append(f"column {name!r}: {self._fault(values, error)}")
        if faults:
            raise DataError(f"{self.starts[0][1]}: the values are no table", faults)
        return pa.table(arrays)

    def _fault(self, values: list[Any], error: Exception) -> str:
        first = next(i for i, x in enumerate(values) if x is not None)
        wanted = _KINDS[type(values[first])]
        for row, value in enumerate(values):
            if value is not None and (kind := _KINDS[type(value)]) != wanted:
                return (
                    f"expected {wanted} in every row, as in {self._place(first)}; "
                    f"found {kind} in {self._place(row)}"
                )
            if type(value) is int and value not in _INT64:
                found = f"found {value} in {self._place(row)}"
                return f"expected whole numbers of 64 bits, {found}; write it as text"
            if type(value) is str and not _encodes(value):
                return f"expected text, found half a surrogate pair in {self._place(row)}"
        # Lists and objects whose parts are of several kinds: only Arrow knows which ones it takes.
        row = bisect_left(range(len(values)), True, key=lambda x: not _is_array(values[: x + 1]))
        found = " ".join(str(error).split())
        return f"expected values of one form, found another in {self._place(row)}: {found}"

    def _place(self, row: int) -> str:
        """A row as its reader would look for it."""
        start, path = next(x for x in reversed(self.starts) if x[0] <= row)
        return f"row {row - start + 1}" + (f" of {path.name}" if len(self.starts) > 1 else "")


def _is_array(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except pa.ArrowException:
        return False
    return True


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
