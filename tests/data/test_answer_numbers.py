"""Final numbers: of GSM8K's own answers, and of texts that break simpler rules."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedexlora.data.answers.number import gold_number, grade_numbers, predicted_number
from fedexlora.data.answers.verdict import Verdict
from fedexlora.errors import DataError

STATED = [
    ("5 * 3 = 15\n#### 15", 15),
    ("#### 1,234", 1234),
    ("#### $1,000,000", 1000000),
    ("#### 20%", 20),
    ("#### 18.", 18),
    ("####18", 18),
    ("#### -5", -5),
    ("#### \\boxed{12}", 12),
    ("#### 5\nThat was step one.\n#### 6", 6),
    ("#### 70,000 dollars, of 80,000", 70000),
    ("\\boxed{18} is my answer, out of 20.", 18),
    ("First \\boxed{3}, so \\boxed{4}.", 4),
    ("Thus $\\boxed{\\$32}$.", 32),
    ("\\boxed{18 \\text{ eggs in 2 boxes}}", 18),
    ("\\boxed{1{,}000}", 1000),
    ("\\boxed{1,\\!000}", 1000),
    ("\\fbox{7}", 7),
    ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
    ("\\boxed{-\\frac{3}{4}}", Fraction(-3, 4)),
    ("\\boxed{1\\frac{1}{2}}", Fraction(3, 2)),
    ("\\boxed{5} is cut off here: \\boxed{6", 5),
    ("The answer is: 18", 18),
    ("The answer is 18.", 18),
    ("The answer is $18.50.", Fraction(37, 2)),
    ("the final answer is **42**!", 42),
    ("**Answer:** 42", 42),
    ("Answer: $-5", -5),
    ("answer = 3", 3),
    ("The answer is:\n\n$$18$$\n\nas 9 + 9 = 18", 18),
    ("The answer is 5 apples, which is 20% of 25.", 5),
    ("The answer is 5 + 6 = 11.", 11),
    ("The answer is 18. Check: 3 * 6 = 17", 18),
    ("The answer is that Mr. Smith has 5", 5),
    ("The answer is 3. No, the answer is 4.", 4),
]
LAST = [
    ("So 5-3=2", 2),
    ("10 - 5", 5),
    ("10-5", 5),
    ("20–25", 25),
    ("It drops to -5", -5),
    ("It drops to −5 degrees", -5),
    ("He owes -$5", -5),
    ("Step 1:\n- 5 apples", 5),
    ("x=-3", -3),
    ("He has $1,234.50 left.", Fraction("1234.5")),
    ("They are 1,2,3", 3),
    ("3, 4, and 5", 5),
    (".5", Fraction(1, 2)),
    ("$.75", Fraction(3, 4)),
    ("36/2", 18),
    ("1,000/2", 500),
    ("2 1/2 hours", Fraction(5, 2)),
    ("It is 3*4", 4),
    ("the total is **$18**.", 18),
    ("__7__", 7),
    ("1.50", Fraction(3, 2)),
    ("007", 7),
    ("5km", 5),
    ("20\\%", 20),
    ("A) 5", 5),
    ("(5)", 5),
    ("1.5e3", 1500),
    ("18 is the answer", 18),
    ("5 litres of H2O", 5),
    ("5 on the 3rd day", 5),
    ("release 1.2.3", Fraction("1.2")),
    ("is 100% sure: 5", 5),
    ("costs £20-25", 25),
]
NONE = ["", "eighteen", "H2O", "On the 3rd day", "5/0", "9" * 5000, "The answer is unclear.\n5"]
NONE += ["The answer is:", "#### \n", "\\boxed{\\text{none}} 5", "x2", "Answer: five, not 6th"]


@pytest.mark.parametrize(("text", "number"), [*STATED, *LAST])
def test_the_number_of_a_text(text, number):
    assert predicted_number(text) == number


@pytest.mark.parametrize("text", NONE)
def test_texts_without_an_answer(text):
    assert predicted_number(text) is None
    assert grade_numbers([text], ["#### 5"]) == [Verdict.UNPARSED]


def test_the_answers_of_gsm8k_are_right_however_they_are_put(real_data):
    lines = (real_data / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()
    golds = [json.loads(line)["answer"] for line in lines]
    numbers = [gold.rpartition("####")[2].strip() for gold in golds]
    assert len(golds) == 1319
    for form in ("{}", "The answer is: {}", "So it is ${}.00.", r"\boxed{{{}}} units", "**{}%**"):
        texts = [form.format(number) for number in numbers]
        assert set(grade_numbers(texts, golds)) == {Verdict.RIGHT}
    assert set(grade_numbers(golds, golds)) == {Verdict.RIGHT}
    wrong = [str(gold_number(gold) + 1) for gold in golds]
    assert set(grade_numbers(wrong, golds)) == {Verdict.WRONG}


def test_right_answers_that_cannot_be_read_are_all_named():
    with pytest.raises(DataError, match=r"row 2: .*'#### many'") as caught:
        grade_numbers(["1", "2", "3"], ["#### 1", "#### many", "3 or 4"])
    assert len(caught.value.faults) == 2
    with pytest.raises(DataError, match="found 1 and 2"):
        grade_numbers(["1"], ["#### 1", "#### 2"])
    with pytest.raises(DataError, match="at least one"):
        grade_numbers([], [])


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{}.", "${}", "{} eggs", "**{}**"]))
def test_every_whole_number_is_read_with_and_without_commas(number, form):
    for text in (f"{number}", f"{number:,}"):
        assert predicted_number("It is " + form.format(text)) == number
        assert gold_number(f"1 + 1 = 2\n#### {text}") == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=0, max_value=10**9))
def test_every_decimal_number_is_read_exactly(number):
    assert predicted_number(f"The answer is {number:,f} m.") == Fraction(number)


@given(st.text(alphabet="0123456789,./-$% \\{}boxedfrac#answeri:=\n", max_size=80))
def test_any_text_has_a_verdict(text):
    assert grade_numbers([text], ["5"])[0] in Verdict
