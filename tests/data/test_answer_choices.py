"""LLM-Adapters' rule, as published, on its data sets' rows and on texts that it misreads."""

import json

import pytest

from fedexlora.data.answers.choice import CHOICES, choice, grade_choices
from fedexlora.data.answers.table import ANSWER_RULES, grade
from fedexlora.data.answers.verdict import Verdict
from fedexlora.errors import DataError

SETS = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_challenge"]
TEXTS = [
    ("boolq", "the correct answer is true", "true"),
    ("boolq", "not true, false", "true"),
    ("boolq", "untrue", "true"),
    ("boolq", "True", None),
    ("boolq", "TRUE or false", "false"),
    ("boolq", "yes", None),
    ("boolq", "", None),
    ("piqa", "the correct answer is solution2, not solution1", "solution2"),
    ("piqa", "solution3 or solution12", "solution1"),
    ("piqa", "solution 1", None),
    ("social_i_qa", "answer10", "answer1"),
    ("social_i_qa", "Answer1 is wrong, answer3", "answer3"),
    ("arc_easy", "answer6", None),
    ("arc_challenge", "answer5\nanswer1", "answer5"),
    ("openbookqa", "The answer4.", "answer4"),
    ("hellaswag", "ending5 ending4", "ending4"),
    ("hellaswag", "the answer1", None),
    ("winogrande", "option2option1", "option2"),
    ("winogrande", "Option1", None),
    ("winogrande", "option3", None),
]


@pytest.mark.parametrize(("name", "text", "expected"), TEXTS)
def test_the_first_word_that_is_a_choice(name, text, expected):
    assert choice(text, CHOICES[name]) == expected


@pytest.mark.parametrize("name", SETS)
def test_the_outputs_of_each_data_set_are_right(real_data, name):
    lines = (real_data / name / "test.jsonl").read_text("utf-8").splitlines()[:500]
    rows = [json.loads(line) for line in lines]
    grades = grade(name, [row["output"] for row in rows], [row["answer"] for row in rows])
    assert grades.score.value == 1.0
    assert {row["answer"] for row in rows} <= set(CHOICES[name])
    other = [next(x for x in CHOICES[name] if x != row["answer"]) for row in rows]
    assert grade(name, other, [row["answer"] for row in rows]).score.value == 0.0


def test_verdicts_are_counted():
    found = grade("boolq", ["true", "false", "perhaps", "True"], ["true"] * 4)
    assert found.score.value == 0.25
    assert found.counts == {
        Verdict.RIGHT: 1,
        Verdict.WRONG: 1,
        Verdict.UNPARSED: 2,
        Verdict.UNDECIDED: 0,
    }


def test_the_eight_sets_of_the_paper_have_a_rule():
    assert set(ANSWER_RULES) == {"gsm8k", "math", *CHOICES}
    assert len(CHOICES) == 8


def test_a_right_answer_that_is_no_choice_is_refused():
    with pytest.raises(DataError, match="row 1: expected a right answer, found 'yes'"):
        grade_choices(["true"], ["yes"], CHOICES["boolq"])
    with pytest.raises(DataError, match="expected one of gsm8k, math, boolq"):
        grade("bool", ["true"], ["true"])
