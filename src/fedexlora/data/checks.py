"""Find what is wrong with the columns of a task, one line a fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset

from fedexlora.data.load import Splits


def named_splits(splits: Splits) -> Iterator[tuple[str, Dataset]]:
    """The splits that there are, with the names that faults call them by."""
    if splits.only:
        yield splits.only, splits.train
        return
    yield "training", splits.train
    yield "validation", splits.validation


def missing_columns(splits: Splits, columns: Iterable[str]) -> list[str]:
    """A fault for each column that a split lacks."""
    wanted = list(dict.fromkeys(columns))
    return [
        f"{split}: expected a column {column!r}, found {shown_columns(rows)}"
        for split, rows in named_splits(splits)
        for column in wanted
        if column not in rows.column_names
    ]


def shown_columns(rows: Dataset) -> str:
    """The names of all columns; those with spaces around them in quotes."""
    return ", ".join(x if x and x == x.strip() else repr(x) for x in rows.column_names)


def text_faults(splits: Splits, columns: Iterable[str], *, in_every_row: bool = True) -> list[str]:
    """A fault for each existing column that is not text, or not in every row."""
    wanted = list(dict.fromkeys(columns))
    faults = []
    for split, rows in named_splits(splits):
        for column in (x for x in wanted if x in rows.column_names):
            found = dtype(rows, column)
            if found not in ("string", "large_string", "null"):
                faults.append(f"{split}, column {column!r}: expected text, found {found}")
            elif in_every_row:
                faults += null_faults(split, column, rows[column][:])
    return faults


def null_faults(split: str, column: str, values: Iterable[Any]) -> list[str]:
    """One fault if some rows have no value, with the number of the first of them (from 1)."""
    rows = [number for number, value in enumerate(values, 1) if value is None]
    if not rows:
        return []
    found = f"found none in {len(rows)} row(s), the first is row {rows[0]}"
    return [f"{split}, column {column!r}: expected a value in every row, {found}"]


def dtype(rows: Dataset, column: str) -> str:
    """The column's type in words: ``int64``, ``string``, or ``nested values``."""
    return str(getattr(rows.features[column], "dtype", "nested values"))
