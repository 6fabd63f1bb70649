"""What a generated answer turned out to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TypeVar

from fedexlora.errors import DataError

Gold = TypeVar("Gold")


class Verdict(StrEnum):
    """All but ``RIGHT`` count as wrong; each is counted by itself."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSED = "unparsed"  # the text holds no answer that the rule can read
    UNDECIDED = "undecided"  # the comparison used up its time, or its process ended


def tally(verdicts: Sequence[Verdict]) -> dict[Verdict, int]:
    """How often each verdict was given; all four are there."""
    counts = Counter(verdicts)
    return {verdict: counts[verdict] for verdict in Verdict}


def right_answers(
    predictions: Sequence[str], expected: Sequence[str], read: Callable[[str], Gold | None]
) -> list[Gold]:
    """The right answers, read from the data set's texts ``(n,)``.

    Args:
        predictions: the generated texts, ``(n,)``.
        expected: the data set's texts, ``(n,)``.
        read: the right answer in such a text; None if there is none.

    Raises:
        DataError: the lengths differ, there is no row, or a text holds no right answer.
    """
    if len(predictions) != len(expected) or not expected:
        raise DataError(
            f"expected as many generated texts as right answers, at least one; found "
            f"{len(predictions)} and {len(expected)}"
        )
    found = [read(text) for text in expected]
    faults = [
        f"row {i}: expected a right answer, found {text[-60:]!r}"
        for i, (text, answer) in enumerate(zip(expected, found, strict=True), 1)
        if answer is None
    ]
    if faults:
        raise DataError("right answers that cannot be read", faults)
    return [answer for answer in found if answer is not None]
