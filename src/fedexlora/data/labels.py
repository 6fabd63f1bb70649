"""The labels of a column as they are written: ``01`` is not ``1``, and ``True`` is not ``true``."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset

Label: TypeAlias = str | int | bool


def label_text(feature: object, *, by_number: bool) -> Callable[[Any], str | None]:
    """What a value of a label column is as text; None for no label.

    Args:
        feature: the column's; a column of the hub's named labels holds their numbers.
        by_number: whether such numbers stand for themselves and not for their names.
    """
    if isinstance(feature, ClassLabel) and not by_number:
        names = feature.names
        # The hub marks rows without a label by -1.
        return lambda x: names[x] if x is not None and 0 <= x < len(names) else None
    return lambda x: None if x is None else str(x)


def column_labels(rows: Dataset, column: str, *, by_number: bool) -> list[str | None]:
    """The label of every row as it is written."""
    text = label_text(rows.features[column], by_number=by_number)
    return [text(value) for value in rows[column][:]]


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Different labels, sorted: as numbers if all of them are whole ones, as text otherwise."""
    found = set(labels)
    if all(_is_number(x) for x in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def look_alikes(labels: Iterable[str]) -> list[tuple[str, ...]]:
    """Labels that differ in no more than case, spaces at their ends, or Unicode's form.

    >>> look_alikes(["yes", "no", "Yes "])
    [('yes', 'Yes ')]
    """
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(unicodedata.normalize("NFKC", label).strip().casefold(), []).append(label)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _is_number(label: str) -> bool:
    digits = label.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and str(int(label)) == label
