"""Names of the answer rules, what each needs, and the accuracy of generated answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedexlora.data.answers.boxed import grade_boxed
from fedexlora.data.answers.choice import CHOICES, grade_choices
from fedexlora.data.answers.number import grade_numbers
from fedexlora.data.answers.verdict import Verdict, tally
from fedexlora.data.score import Score, missing, versions
from fedexlora.errors import DataError

# Verdicts depend on all three: with another antlr, math-verify reads some answers otherwise.
MATH_VERIFY = ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime")


@dataclass(frozen=True, slots=True)
class AnswerRule:
    """How answers of one data set are read and compared.

    Attributes:
        grade: a verdict for each generated text, of the texts and the right answers, ``(n,)`` each.
        requirements: the packages that it needs.
        implementation: the rule in a few words.
    """

    grade: Callable[[Sequence[str], Sequence[str]], list[Verdict]]
    requirements: tuple[str, ...]
    implementation: str


@dataclass(frozen=True, slots=True)
class Grades:
    """The accuracy, 0 to 1, of generated answers, and their verdicts.

    Attributes:
        score: the accuracy; not computed if a package is missing.
        verdicts: one a row, ``(n,)``; empty if the score was not computed.
    """

    score: Score
    verdicts: tuple[Verdict, ...]

    @property
    def counts(self) -> dict[Verdict, int]:
        """How often each verdict was given."""
        return tally(self.verdicts)


ANSWER_RULES: Mapping[str, AnswerRule] = {
    "gsm8k": AnswerRule(grade_numbers, (), "fedexlora, final number, exact"),
    "math": AnswerRule(grade_boxed, MATH_VERIFY, "last box, same text or math-verify"),
    **{
        name: AnswerRule(
            partial(grade_choices, choices=choices), (), "fedexlora, LLM-Adapters' first choice"
        )
        for name, choices in CHOICES.items()
    },
}


def rule_faults(name: str) -> list[str]:
    """What keeps this rule from being used on this machine; empty if nothing."""
    if name not in ANSWER_RULES:
        return [f"{name!r} is no answer rule; expected one of {', '.join(ANSWER_RULES)}"]
    return [f"{name}: {fault}" for fault in missing(ANSWER_RULES[name].requirements)]


def grade(name: str, predictions: Sequence[str], expected: Sequence[str]) -> Grades:
    """The accuracy of generated texts by a rule; not computed if its package is missing.

    Args:
        name: a key of ``ANSWER_RULES``.
        predictions: the generated texts, ``(n,)``, without their prompts.
        expected: what the data set gives as right, ``(n,)``.

    Raises:
        DataError: the name is unknown, the lengths differ, or a right answer cannot be read.
    """
    if name not in ANSWER_RULES:
        raise DataError("unknown answer rule", rule_faults(name))
    rule = ANSWER_RULES[name]
    absent = missing(rule.requirements)
    verdicts = [] if absent else rule.grade(predictions, expected)
    value = None if absent else verdicts.count(Verdict.RIGHT) / len(verdicts)
    reason = "; ".join(absent) or None
    score = Score("accuracy", value, reason, rule.implementation, versions(rule.requirements))
    return Grades(score, tuple(verdicts))
