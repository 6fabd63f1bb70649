"""Commonsense answers by the rule of LLM-Adapters (arXiv:2304.01933).

The answer is the first of the data set's words that stands anywhere in the generated text, also
inside another word, in exactly this spelling. So ``not true, false`` is ``true``, ``answer10`` is
``answer1`` and ``True`` is no answer. These are published numbers' rule, kept as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fedexlora.data.answers.verdict import Verdict, right_answers

ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")
CHOICES: Mapping[str, tuple[str, ...]] = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ANSWERS,
    "arc_challenge": ANSWERS,
    "arc_easy": ANSWERS,
    "openbookqa": ANSWERS,
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
}


def choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that stands first in a generated text, without the prompt; None if none does."""
    found = re.search("|".join(map(re.escape, choices)), text)
    return found[0] if found else None


def grade_choices(
    predictions: Sequence[str], expected: Sequence[str], choices: Sequence[str]
) -> list[Verdict]:
    """A verdict for each generated text.

    Args:
        predictions: the generated texts, ``(n,)``, without their prompts.
        expected: the right choices, ``(n,)``: the column ``answer``.
        choices: the words that are choices.

    Raises:
        DataError: the lengths differ, or a right choice is none of the choices.
    """
    golds = right_answers(predictions, expected, lambda x: x if x in choices else None)
    found = (choice(text, choices) for text in predictions)
    return [_verdict(x, gold) for x, gold in zip(found, golds, strict=True)]


def _verdict(found: str | None, gold: str) -> Verdict:
    if found is None:
        return Verdict.UNPARSED
    return Verdict.RIGHT if found == gold else Verdict.WRONG
