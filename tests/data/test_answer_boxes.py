"""Boxed answers in the manner of MATH: where they stand, and which are equal."""

import json
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedexlora.data import score
from fedexlora.data.answers import equivalence
from fedexlora.data.answers.boxed import gold_answer, grade_boxed, predicted_answer
from fedexlora.data.answers.equivalence import equal_answers
from fedexlora.data.answers.table import grade, rule_faults
from fedexlora.data.answers.verdict import Verdict
from fedexlora.errors import DataError, RunError

needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="needs math-verify")
STATED = [
    (r"so \boxed{5}", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\frac{\sqrt{3}}{x^{2}}} and {more}", r"\frac{\sqrt{3}}{x^{2}}"),
    (r"\boxed{1} then \boxed{2}.", "2"),
    (r"\boxed{1} then \fbox{2}.", "2"),
    (r"\fbox{x+1}", "x+1"),
    (r"\boxed {7}", "7"),
    (r"\boxed 7$", "7"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{\boxed{9}}", "9"),
    (r"\boxed{3} but \boxed{\frac{1}{", "3"),
    (r"\boxed{10\%}", "10"),
    (r"$\boxed{\text{(B)}}$", r"\text{(B)}"),
    ("The answer is: $\\frac{1}{2}$.", r"\frac{1}{2}"),
    ("The answer is 0.5. I am sure.", "0.5"),
    ("Answer: **x^2**", "x^2"),
    ("**Answer:** \\(3\\)", "3"),
    ("The answer is 3, or \\boxed{4}", "4"),
    ("no answer here, 5", None),
    (r"\boxed{}", None),
    (r"\boxed{5", None),
    ("", None),
]
EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\tfrac12"),
    (r"1\frac{1}{2}", "1.5"),
    (r"-\frac{1}{3}", r"\frac{-1}{3}"),
    (r"\dfrac{9}{7}", "9/7"),
    ("1/2", ".5"),
    ("5", "5.0"),
    ("14", "14."),
    (r"10\%", "10"),
    (r"\text{Sunday}", "Sunday"),
    (r"\text{June 20}", r"June\ 20"),
    (r"\text{(E)}", "E"),
    (r"\text{(C)}", r"\text{C}"),
    (r"5\text{ cm}", "5"),
    ("5", r"5 \text{ inches}"),
    (r"70 \text{ mph}", "70"),
    (r"\$18.90", "18.9"),
    (r"\$32{,}000", "32000"),
    (r"32,\!000", "32000"),
    ("32,000", "32000"),
    ("(1,2)", "(1, 2)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"(\frac{1}{2},3)", "(0.5,3)"),
    ("[1,2)", "[1, 2)"),
    (r"(-\infty,3)", r"(-\infty, 3)"),
    (r"(0,9) \cup (9,36)", r"(0,9)\cup(9,36)"),
    ("1,2,3", "1,3,2"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"3\sqrt{2}", r"\sqrt{18}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"11\sqrt2", r"11\sqrt{2}"),
    (r"2\pi", r"2 \pi"),
    ("x^2+2x+1", "(x+1)^2"),
    ("a+b", "b+a"),
    ("y=2x+3", "2x+3"),
    ("y=2x+3", "y = 3+2x"),
    ("5", "x=5"),
    (r"90^\circ", "90"),
    ("90", r"90^{\circ}"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("x<3", "3>x"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    ("2^{10}", "1024"),
    ("10!", "3628800"),
    (r"\binom{5}{2}", "10"),
    ("3+4i", "4i+3"),
    (r"e^{i\pi/4}", r"e^{\frac{\pi i}{4}}"),
    (r"\sin x", r"\sin(x)"),
    (r"3 \pm 2\sqrt{2}", r"3+2\sqrt{2}, 3-2\sqrt{2}"),
    ("5", r"\mathbf{5}"),
    ("144", "12^2"),
]
DIFFERENT = [
    (r"10\%", "0.1"),
    (r"\text{Sunday}", r"\text{Monday}"),
    (r"\text{(C)}", r"\text{D}"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    (r"(-\infty,3]", r"(-\infty,3)"),
    ("1,-2", "1, 2"),
    (r"2\pi", "6.28"),
    (r"-\frac{1}{3}", "-0.333"),
    (r"\frac{243}{625}", r"\frac{243}{626}"),
    ("x^2+2x+1", "(x-1)^2"),
    ("3+4i", "3-4i"),
    (r"x \le 3", "x<3"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("17", "seventeen"),
    ("4:3", "3:4"),
    (r"\text{no solution}", "0"),
    ("5", "-5"),
]


@pytest.mark.parametrize(("text", "answer"), STATED)
def test_where_an_answer_stands(text, answer):
    assert predicted_answer(text) == answer


@needs_math_verify
def test_verdicts_on_answers_in_the_manner_of_math():
    pairs = [*EQUAL, *DIFFERENT]
    golds = [rf"Hence \fbox{{0}}, and so $\boxed{{{gold}}}$." for gold, _ in pairs]
    texts = [rf"We get \boxed{{1}}, so \boxed{{{given}}}." for _, given in pairs]
    found = grade_boxed(texts, golds, seconds=60)
    expected = [Verdict.RIGHT] * len(EQUAL) + [Verdict.WRONG] * len(DIFFERENT)
    differ = [x for x, f, e in zip(pairs, found, expected, strict=True) if f != e]
    assert not differ


def test_the_same_text_needs_no_comparison(monkeypatch):
    monkeypatch.setattr(equivalence, "WORKER", "none")
    golds = ["x + 1", r"\text{two words}", r"\left(1, 2\right)"]
    texts = [r"\boxed{x+1}", r"\boxed{two\ words}", r"\boxed{(1,2)}"]
    assert grade_boxed(texts, golds) == [Verdict.RIGHT] * 3
    assert grade_boxed(["nothing"], golds[:1]) == [Verdict.UNPARSED]
    assert gold_answer(r"so $\boxed{\frac12}$") == r"\frac12"


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A worker that answers by the given answer's text: it sleeps, ends, or says equal."""
    (tmp_path / "small_worker.py").write_text(
        "import json, os, sys, time\n"
        "os.write(1, b'r')\n"
        "for line in sys.stdin:\n"
        "    word = json.loads(line)[1]\n"
        "    if word == 'hang': time.sleep(600)\n"
        "    if word == 'die': os._exit(1)\n"
        "    os.write(1, b'1' if word == 'same' else b'0')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(equivalence, "WORKER", "small_worker")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_comparison_that_hangs_or_dies_is_ended_and_the_others_go_on(worker, workers):
    words = ["same", "hang", "other", "die", "same", "hang", "die", "same"]
    found = equal_answers([("x", word) for word in words], seconds=0.3, workers=workers)
    expected = {"same": True, "hang": None, "other": False, "die": None}
    assert found == [expected[word] for word in words]
    verdicts = grade_boxed([r"\boxed{die}", r"\boxed{same}"], ["1", "1"], seconds=10)
    assert verdicts == [Verdict.UNDECIDED, Verdict.RIGHT]


def test_a_process_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(equivalence, "WORKER", "fedexlora.no_such_module")
    with pytest.raises(RunError, match="did not start"):
        equal_answers([("1", "2")], seconds=1, workers=2)
    assert equal_answers([], seconds=1) == []


@needs_math_verify
def test_a_power_of_powers_does_not_hang():
    assert grade_boxed([r"\boxed{9^{9^{9^{9^9}}}}"], ["5"], seconds=1) == [Verdict.UNDECIDED]


def test_without_math_verify_nothing_is_computed(monkeypatch):
    monkeypatch.setattr(score, "_version", lambda name: None)
    found = grade("math", [r"\boxed{1}"], ["1"])
    assert found.score.value is None
    assert "math-verify is missing: pip install 'fedexlora[math]'" in found.score.reason
    assert found.verdicts == ()
    assert len(rule_faults("math")) == 3
    assert rule_faults("gsm8k") == []


@needs_math_verify
def test_the_score_names_the_versions_that_verdicts_depend_on():
    found = grade("math", [r"\boxed{1}", "?"], ["1", "2"])
    assert found.score.value == 0.5
    for name in ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime"):
        assert f"{name} " in found.score.version


def test_an_empty_right_answer_is_refused():
    with pytest.raises(DataError, match="row 2"):
        grade_boxed(["1", "2"], [r"\boxed{1}", r"\boxed{}"])


def nested(inner):
    return st.tuples(inner, inner).map(lambda pair: rf"\frac{{{pair[0]}}}{{{pair[1]}}}")


@given(st.recursive(st.sampled_from(["x", "12", r"\{a\}", r"\\"]), nested, max_leaves=8))
def test_braces_may_be_nested_in_any_way(answer):
    found = predicted_answer(rf"\boxed{{0}} {{ \boxed{{{answer}}} }} }}")
    assert found == answer


def test_all_strings_can_be_sent_to_a_worker(worker):
    hostile = ["\n", "\u2028", "\ud800", '"', "x" * 200_000]
    pairs = [(json.dumps(text), text) for text in hostile]
    assert equal_answers(pairs, seconds=20) == [False] * len(hostile)
