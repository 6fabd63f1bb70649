"""Markdown tables of records: means with their spread over seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is words and whose others are numbers."""
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def with_spread(values: Sequence[float], digits: int, *, sign: bool = False) -> str:
    """The mean, and the standard deviation over seeds.

    >>> with_spread([1.0, 2.0, 3.0], 1)
    '2.0 ± 1.0'
    """
    plus = "+" if sign else ""
    return f"{mean(values):{plus}.{digits}f} ± {stdev(values):.{digits}f}"


def by_seed(
    records: Iterable[Mapping], metric: str, factor: float = 1.0, **key: str
) -> list[float]:
    """A metric of the last round of all records with ``key``, in the order of their seeds."""
    found = {
        record["key"]["seed"]: factor * record["metrics"][metric]
        for record in records
        if key.items() <= record["key"].items()
    }
    return [found[seed] for seed in sorted(found)]


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Seed by seed."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def deviations(records: Iterable[Mapping], **key: str) -> list[str]:
    """By round, what averaging loses of its update in all records with ``key``, in per cent."""
    found = [x["deviation"] for x in records if key.items() <= x["key"].items()]
    return [with_spread([100.0 * x for x in each], 1) for each in zip(*found, strict=True)]
