r"""Boxed answers of mathematics problems, as in MATH.

The right answer is in the last ``\boxed{...}`` or ``\fbox{...}`` of the data set's solution. A
generated text states its answer in the last complete box; without a box, in the sentence after the
last "answer is" or "answer:". Signs of per cent are dropped, as in
MATH's own script: ``10\%`` is ``10`` and not ``0.1``.

Two answers are the same if they are the same text, but for blanks, ``\text{...}``, ``\left``,
``\right``, dollar signs around them and a final full stop, or if math-verify finds them equal:
numbers, expressions, sets, intervals, matrices, with or without units.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedexlora.data.answers.equivalence import equal_answers
from fedexlora.data.answers.marker import boxed, sentence, stated
from fedexlora.data.answers.verdict import Verdict, right_answers

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;:]|\\ |\s")
_STOP = re.compile(r"\s*(?<!\\right)\.$")


def gold_answer(text: str) -> str | None:
    """The right answer: of a solution what its last box holds, else the whole text."""
    return _trimmed(text if boxed(text) is None else boxed(text))


def predicted_answer(text: str) -> str | None:
    """The answer that a generated text states, by the module's rule; None if it states none."""
    found = boxed(text)
    if found is None:
        line = stated(text)
        found = None if line is None else sentence(line)
    return _trimmed(found)


def grade_boxed(
    predictions: Sequence[str], expected: Sequence[str], *, seconds: float = 5.0, workers: int = 1
) -> list[Verdict]:
    """A verdict for each generated text.

    Args:
        predictions: the generated texts, ``(n,)``, without their prompts.
        expected: the data set's solutions, ``(n,)``, or their answers alone.
        seconds: the longest that one comparison may take; then it is ``UNDECIDED``.
        workers: how many processes compare. All take at most ``seconds * n / workers``, and the
            start of a process for each comparison that was ended.

    Raises:
        DataError: the lengths differ, or a right answer is empty.
        RunError: a process with math-verify does not start.
    """
    golds = right_answers(predictions, expected, gold_answer)
    found = [predicted_answer(text) for text in predictions]
    verdicts = [_by_text(x, gold) for x, gold in zip(found, golds, strict=True)]
    open_rows = [i for i, verdict in enumerate(verdicts) if verdict is None]
    pairs = [(golds[i], str(found[i])) for i in open_rows]
    compared = equal_answers(pairs, seconds=seconds, workers=workers)
    for i, equal in zip(open_rows, compared, strict=True):
        verdicts[i] = _by_value(equal)
    return [verdict for verdict in verdicts if verdict is not None]


def _by_text(found: str | None, gold: str) -> Verdict | None:
    if found is None:
        return Verdict.UNPARSED
    return Verdict.RIGHT if _plain(found) == _plain(gold) else None


def _by_value(equal: bool | None) -> Verdict:
    if equal is None:
        return Verdict.UNDECIDED
    return Verdict.RIGHT if equal else Verdict.WRONG


def _plain(answer: str) -> str:
    return _LAYOUT.sub("", _WRAPPER.sub(r"\1", answer))


def _trimmed(answer: str | None) -> str | None:
    """An answer without the signs around it; None if nothing is left."""
    if answer is None:
        return None
    text = _without_stop(answer.replace(r"\%", "").replace("%", "").strip().strip("*"))
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text.removeprefix(opening).removesuffix(closing)
        if len(text) - len(inner) == len(opening) + len(closing):
            text = _without_stop(inner)
    return text or None


def _without_stop(text: str) -> str:
    return _STOP.sub("", text.strip())
