"""BLEU, NIST, METEOR, ROUGE-L and CIDEr: the published definitions' values, to the digits."""

import json
import math
import shutil
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexlora.data import score
from fedexlora.data.score import Score, UncomputedError
from fedexlora.data.text_metrics import java, table
from fedexlora.data.text_metrics.table import (
    E2E_METRICS,
    TEXT_METRICS,
    TextMetric,
    metric_faults,
    text_scores,
)
from fedexlora.errors import DataError

needs_java = pytest.mark.skipif(
    shutil.which("java") is None or find_spec("pycocoevalcap") is None,
    reason="needs pycocoevalcap and Java",
)


def value(name, predictions, references):
    (found,) = text_scores([name], predictions, references)
    assert found.reason is None
    return found.value


@pytest.fixture(scope="module")
def e2e(real_data):
    """References of every tenth meaning representation of E2E's validation set, 4 to 29 each."""
    grouped = {}
    for line in (real_data / "e2e_nlg" / "validation.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        grouped.setdefault(row["meaning_representation"], []).append(row["human_reference"])
    return list(grouped.values())[::10]


@pytest.fixture(scope="module")
def another_row(e2e):
    """As predictions: the first reference of the next row."""
    return [row[0] for row in [*e2e[1:], e2e[0]]]


@pytest.fixture
def sacrebleu():
    return pytest.importorskip("sacrebleu")


def test_bleu_of_the_e2e_references_is_that_of_sacrebleu(sacrebleu, e2e, another_row):
    """Repeating a reference changes neither counts nor lengths, and makes the rows even."""
    assert len({len(row) for row in e2e}) > 10
    most = max(map(len, e2e))
    even = [[row[i] if i < len(row) else row[-1] for row in e2e] for i in range(most)]
    expected = sacrebleu.corpus_bleu(another_row, even).score
    assert value("bleu", another_row, e2e) == pytest.approx(expected, abs=1e-12)
    lower = sacrebleu.corpus_bleu(another_row, even, lowercase=True).score
    assert value("e2e_bleu", another_row, e2e) == pytest.approx(lower, abs=1e-12)


def test_bleu_and_nist_are_those_of_the_e2e_script(sacrebleu, e2e, another_row):
    """Values of the E2E challenge's `measure_scores.py`: `-p` to all digits, Perl's BLEU to four.

    Perl's NIST is another one where rows have unequal numbers of references: it pads them with
    empty references, which shortens their mean length.
    """
    assert value("e2e_bleu", another_row, e2e) == pytest.approx(26.81867779110077, abs=1e-9)
    assert value("nist", another_row, e2e) == pytest.approx(4.490861927651453, abs=1e-9)
    assert round(value("e2e_bleu", another_row, e2e) / 100, 4) == 0.2682
    short = [" ".join(row[-1].split()[:-2]) for row in e2e]
    assert value("e2e_bleu", short, e2e) == pytest.approx(96.49996596240814, abs=1e-9)
    assert value("nist", short, e2e) == pytest.approx(10.926972923645797, abs=1e-9)


words = st.lists(st.sampled_from(["a", "bar", "cheap", "Eagle", ",", "5.5"]), min_size=1).map(
    " ".join
)


@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=4)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_rows_may_have_any_number_of_references(rows):
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions, references = zip(*rows, strict=True)
    even = [[row[min(i, len(row) - 1)] for row in references] for i in range(4)]
    expected = sacrebleu.corpus_bleu(list(predictions), even).score
    assert value("bleu", predictions, references) == pytest.approx(expected, abs=1e-12)


def test_bleu_minds_case_and_the_e2e_one_does_not(sacrebleu):
    prediction, reference = ["the eagle is a cheap pub ."], [["The Eagle is a cheap pub."]]
    assert value("e2e_bleu", prediction, reference) == pytest.approx(100)
    assert value("bleu", prediction, reference) < 65


def test_nist_by_hand(sacrebleu):
    """Two of three words: information log2(3) a word; a length ratio of 2/3 halves the score."""
    assert value("nist", ["red bus"], [["Red bus stops"]]) == pytest.approx(math.log2(3) / 2)
    assert value("nist", ["red bus stops"], [["Red bus stops"]]) == pytest.approx(math.log2(3))
    # "of" is twice in 4 words of references: log2(4/2); "tea" and "cup" once: log2(4/1); the pair
    # "cup of" adds log2(1/1) and "of tea" log2(2/1) over two pairs.
    found = value("nist", ["cup of tea"], [["cup of", "of tea"]])
    assert found == pytest.approx((2 + 1 + 2) / 3 + 1 / 2)


@pytest.mark.parametrize("name", ["bleu", "e2e_bleu", "nist"])
def test_a_model_that_generates_nothing_scores_zero(sacrebleu, name):
    assert value(name, ["", ""], [["a b"], ["c d", "e"]]) == 0.0


def test_all_faults_of_the_texts_are_said_at_once():
    with pytest.raises(DataError, match="row 2: expected at least one reference") as caught:
        text_scores(["bleu"], ["a", "b", "c", "d"], [["x"], [], ["y", " "], "text"])
    assert len(caught.value.faults) == 3
    assert "row 3: reference 2 is empty" in str(caught.value)
    with pytest.raises(DataError, match="references of 2 rows, found 1"):
        text_scores(["bleu"], ["a", "b"], [["x"]])
    with pytest.raises(DataError, match="at least one row"):
        text_scores(["bleu"], [], [])
    with pytest.raises(DataError, match="'blue' is no metric; expected one of bleu,"):
        text_scores(["blue"], ["a"], [["x"]])


def test_what_is_missing_is_known_before_and_not_replaced(monkeypatch):
    monkeypatch.setattr(score, "_version", lambda name: None if name == "java" else "1")
    faults = metric_faults(E2E_METRICS)
    assert [x.partition(":")[0] for x in faults] == ["meteor", "rouge_l", "cider"]
    assert all("java is missing: install" in x for x in faults)
    (found,) = text_scores(["meteor"], ["a"], [["a"]])
    assert (found.value, found.version) == (None, "")
    assert "java is missing" in found.reason
    assert metric_faults(["meteo"]) == [
        f"'meteo' is no metric; expected one of {', '.join(TEXT_METRICS)}"
    ]


def test_a_program_that_fails_leaves_its_score_uncomputed(monkeypatch):
    monkeypatch.setattr(score, "_version", lambda name: "1")
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    monkeypatch.setattr(java, "ptb_tokens", lambda texts: texts)
    monkeypatch.setattr("fedexlora.data.text_metrics.corpus.ptb_tokens", lambda texts: list(texts))
    (found,) = text_scores(["meteor"], ["a"], [["a"]])
    assert found.value is None
    assert found.reason == "pycocoevalcap has no meteor/meteor-1.5.jar"


@pytest.mark.parametrize("script", ["exec sleep 60", "exit 1", "echo text; exec cat"])
def test_a_program_that_hangs_ends_or_babbles_is_ended(tmp_path, monkeypatch, script):
    (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(java, "SECONDS", 0.3)
    monkeypatch.setattr(java, "_jar", lambda name: tmp_path / "meteor.jar")
    with pytest.raises(UncomputedError, match="METEOR"):
        java.meteor([["a"], ["b"]], ["a", "b"])


def test_a_value_that_is_no_number_is_not_computed(monkeypatch):
    metric = TextMetric(lambda corpus: math.nan, (), "program")
    monkeypatch.setattr(table, "TEXT_METRICS", {"m": metric})
    (found,) = text_scores(["m"], ["a"], [["a"]])
    assert (found.value, found.reason) == (None, "its value is nan")


def test_a_score_has_a_value_or_a_reason():
    for pair in ((None, None), (1.0, "why"), (math.nan, None)):
        with pytest.raises(ValueError, match="m: "):
            Score("m", *pair, "program", "1")


def test_the_packages_of_a_score_are_named(sacrebleu):
    (found,) = text_scores(["e2e_bleu"], ["a b c d"], [["a b c d"]])
    assert found.version == f"sacrebleu {sacrebleu.__version__}"
    assert "case:lc" in found.implementation


@needs_java
def test_the_tokens_are_those_of_ms_coco_and_rows_keep_their_place():
    texts = ["The Éagle (a pub) costs £20-25, doesn't it?", "", "one\u2028two\r\nthree", "...", ""]
    assert java.ptb_tokens(texts) == [
        "the éagle -lrb- a pub -rrb- costs # 20-25 does n't it",
        "",
        "one two three",
        "",
        "",
    ]


@needs_java
@pytest.mark.slow
def test_meteor_rouge_l_and_cider_are_those_of_the_e2e_script(e2e, another_row):
    """Values of pycocoevalcap 1.2's own tokenizer and metrics, which the E2E script calls."""
    found = text_scores(["meteor", "rouge_l", "cider"], another_row, e2e)
    expected = [25.348288146499893, 41.36185893339272, 0.6350958954457482]
    assert [x.value for x in found] == pytest.approx(expected, abs=1e-9)
    assert all("pycocoevalcap" in x.version and "java" in x.version for x in found)


@needs_java
def test_rouge_l_by_hand():
    """All of the prediction, half of the reference, beta 1.2: 2.44 * 0.5 / (0.5 + 1.44)."""
    found = value("rouge_l", ["red bus"], [["Red bus stops here."]])
    assert found == pytest.approx(100 * 2.44 * 0.5 / 1.94)
