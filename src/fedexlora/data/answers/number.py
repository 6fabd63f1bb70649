r"""Final numbers of word problems, as in GSM8K.

The right number follows the last ``####``. A generated text states its number in the first of
these that it has:

1. the line after the last ``####``,
2. the last ``\boxed{...}``,
3. the line after the last "answer is" or "answer:",
4. the whole text, of which the last number counts.

In 1 to 3 the first number counts; of a sentence with an equals sign, the first after the last sign.
A mark without a number after it is no answer, whatever numbers stand elsewhere. Numbers are
compared exactly, as fractions: ``18``, ``18.00``, ``$18`` and ``36/2`` are the same one. Units,
currencies and ``%`` are dropped. Numbers in words, ordinals and digits inside words are no numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from fedexlora.data.answers.marker import boxed, hashed, sentence, stated
from fedexlora.data.answers.verdict import Verdict, right_answers

DIGITS = 1000  # of a number that is read; more is a generation that never ended
_CURRENCY = r"[$£€¥₹]"
_GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)"
_NUMBER = re.compile(
    rf"""
    (?:(?<![\w)\]%.])(?P<sign>-))?        # touches the number; "3-5" and "- 5" have none
    {_CURRENCY}?
    (?:(?<=[$£€¥₹])(?P<inner>-))?
    (?<![A-Za-z_\d])(?<!\d[./])            # "H2O" and the tails of "1.2.3", "1/2/3" are none
    (?:
        (?P<whole>\d+)\ (?P<part>\d+/\d+)(?![\d/])
      | (?P<ratio>(?:{_GROUPED}|\d+)/(?:{_GROUPED}|\d+))(?![\d/])
      | (?P<grouped>{_GROUPED}(?:\.\d+)?)
      | (?P<plain>\d+(?:\.\d+)?(?:[eE][+-]?\d{{1,2}}(?!\d))?|\.\d+)
    )
    (?!\d)(?!(?:st|nd|rd|th)\b)
    """,
    re.VERBOSE,
)
_LATEX = (
    (re.compile(r"(?<=\d)\s*(?=\\[dtc]?frac)"), " "),
    (re.compile(r"\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r"\1/\2"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3})"), ","),
    (re.compile(r"\\([$%£€])"), r"\1"),
    (re.compile(r"[−‐‑–](?=[\d.$£€¥₹])"), "-"),
    (re.compile(r"(?<![\d*])[*_`]{1,3}(?=[\d.$£€¥₹-])|(?<=[\d%])\*{2,3}(?!\d)"), ""),
)


def gold_number(text: str) -> Fraction | None:
    """The number after the last ``####``; without the mark, of a text that is one number."""
    marked = hashed(text)
    return _only(text if marked is None else marked)


def predicted_number(text: str) -> Fraction | None:
    """The number that a generated text states as its answer, by the module's rule."""
    for rule in (hashed, boxed, stated):
        found = rule(text)
        if found is not None:
            return _first(found)
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def grade_numbers(predictions: Sequence[str], expected: Sequence[str]) -> list[Verdict]:
    """A verdict for each generated text.

    Args:
        predictions: the generated texts, ``(n,)``, without their prompts.
        expected: the data set's solutions, ``(n,)``, which end in ``#### <number>``, or numbers.

    Raises:
        DataError: the lengths differ, or a solution holds no number.
    """
    golds = right_answers(predictions, expected, gold_number)
    found = map(predicted_number, predictions)
    return [_verdict(x, gold) for x, gold in zip(found, golds, strict=True)]


def _verdict(found: Fraction | None, gold: Fraction) -> Verdict:
    if found is None:
        return Verdict.UNPARSED
    return Verdict.RIGHT if found == gold else Verdict.WRONG


def _only(text: str) -> Fraction | None:
    numbers = _numbers(text)
    return numbers[0] if len(numbers) == 1 else None


def _first(line: str) -> Fraction | None:
    start = sentence(line)
    for part in (start.rpartition("=")[2], start, line):
        numbers = _numbers(part)
        if numbers:
            return numbers[0]
    return None


def _numbers(text: str) -> list[Fraction | None]:
    """All numbers, in order; None for one that has no value, such as ``1/0``."""
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return [_value(found) for found in _NUMBER.finditer(text)]


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > DIGITS:
        return None
    try:
        if found["whole"]:
            value = Fraction(found["whole"]) + Fraction(found["part"])
        else:
            text = found["ratio"] or found["grouped"] or found["plain"]
            value = Fraction(text.replace(",", ""))
    except ZeroDivisionError:
        return None
    return -value if found["sign"] or found["inner"] else value
