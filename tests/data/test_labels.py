"""Labels are what is written, and a row without one is named."""

import pytest
from datasets import ClassLabel, Dataset
from hypothesis import given
from hypothesis import strategies as st

from fedexlora.data.config import ClassificationTask, DataConfig, RegressionTask
from fedexlora.data.load import Splits, load_splits
from fedexlora.data.task import prepare_task, stated
from fedexlora.data.tokenizer import prepare_tokenizer
from fedexlora.errors import DataError

CONFIG = ClassificationTask(text="a")


def table(labels, names=None):
    rows = Dataset.from_dict({"a": ["w1"] * len(labels), "label": labels})
    return rows.cast_column("label", ClassLabel(names=names)) if names else rows


def task_of(labels, validation=None, config=CONFIG):
    validation = validation if validation is not None else labels
    parts = [x if isinstance(x, Dataset) else table(x) for x in (labels, validation)]
    return prepare_task(config, Splits(*parts, ""))


def faults_of(labels, validation=None, config=CONFIG):
    with pytest.raises(DataError) as caught:
        task_of(labels, validation, config)
    return list(caught.value.faults)


def classes(task, rows, bert):
    return task.tokenize(rows, prepare_tokenizer(bert, None))["labels"][:]


WRITTEN = st.sampled_from(["01", "1", "1.0", "-1", "True", "true", "NA", "nan", " a", "a ", "ü"])


@given(st.lists(WRITTEN, min_size=2, max_size=9).filter(lambda x: len(set(x)) > 1))
def test_text_labels_stay_as_they_are_written(labels):
    assert set(task_of(labels).labels) == set(labels)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "9", "2", "-1"], ("-1", "2", "9", "10")),
        (["10", "9", "02"], ("02", "10", "9")),
        ([10, 9, 2], ("2", "9", "10")),
        ([True, False], ("False", "True")),
    ],
)
def test_labels_are_sorted_as_numbers_if_all_are(labels, expected):
    assert task_of(labels).labels == expected


def test_a_number_and_its_text_are_one_label_in_any_file(bert, tmp_path):
    (tmp_path / "train.csv").write_text("a,label\nw1,1\nw1,0\nw1,1\n")
    (tmp_path / "validation.jsonl").write_text('{"a": "w1", "label": 0}\n')
    splits = load_splits(DataConfig(source=str(tmp_path)), 0)
    task = prepare_task(CONFIG, splits)
    assert classes(task, splits.train, bert) == [1, 0, 1]
    assert classes(task, splits.validation, bert) == [0]


@pytest.mark.parametrize(
    ("stated_labels", "column"),
    [(("1", "0"), [1, 0]), ((1, 0), ["1", "0"]), ((True, False), [True, False])],
)
def test_stated_labels_match_as_they_are_written(stated_labels, column, bert):
    task = task_of(column, config=ClassificationTask(text="a", labels=stated_labels))
    assert classes(task, table(column), bert) == [0, 1]


def test_named_labels_of_another_order_keep_their_names(bert):
    train, validation = table([0, 1], ["no", "yes"]), table([0, 1], ["yes", "no"])
    task = task_of(train, validation)
    assert task.labels == ("no", "yes")
    assert classes(task, validation, bert) == [1, 0]
    assert classes(task, table(["yes", "no"]), bert) == [1, 0]


def test_whoever_gets_the_stated_task_numbers_labels_alike(bert):
    server = task_of(["b", "a", "c"])
    node = prepare_task(stated(server), Splits.one("training", table(["c", "b"])))
    assert node.labels == server.labels == ("a", "b", "c")
    assert classes(node, table(["c", "b"]), bert) == [2, 1]
    assert stated(task_of([3, 1])).labels == (1, 3)
    assert stated(task_of(table([1, 0], ["n", "p"]))).labels == ("n", "p")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            [1, 0, None, 0],
            "expected a value in every row, found none in 1 row(s), the first is row 3",
        ),
        (
            [1.0, None, 0.0],
            "expected a value in every row, found none in 1 row(s), the first is row 2",
        ),
        ([1.0, 0.5, 0.0], "labels, found float64, 0.5 in row 2"),
        ([1.0, 0.0], "labels, found float64, 1.0 in row 1"),
        ([None, None], "found none in 2 row(s), the first is row 1"),
        (table([0, -1, 1], ["a", "b"]), "found none in 1 row(s), the first is row 2"),
    ],
)
def test_a_missing_or_odd_label_is_named_by_row(labels, expected):
    assert expected in "\n".join(faults_of(labels, table(["1", "0"])))


def test_labels_that_look_alike_are_said():
    assert task_of(["a", "b", "c"]).notes == []
    (note,) = task_of(["yes", "Yes ", "no"]).notes
    assert "'Yes ', 'yes'" in note
    (note,) = task_of(["caf\u00e9", "cafe\u0301", "no"]).notes
    assert "Unicode" in note


NUMBERS = RegressionTask(text="a")


@pytest.mark.parametrize("labels", [["1", " -2.5", "3e2"], [1, -2, 300], [1.0, -2.5, 300.0]])
def test_numbers_may_be_written_as_text(labels, bert):
    task = task_of(labels, config=NUMBERS)
    found = task.tokenize(table(labels), prepare_tokenizer(bert, None))["labels"][:]
    assert found == [float(x) for x in labels]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1", "2,5"], "expected numbers, found '2,5' in row 2"),
        (["1", "1_000"], "expected numbers, found '1_000' in row 2"),
        (["1", "٣"], "expected numbers, found '٣' in row 2"),
        (["1", "nan"], "expected finite numbers, found 'nan' in row 2"),
        ([1.0, 1e300], "whose square float32 holds, found 1e+300 in row 2"),
        (["1", "-1e20"], "whose square float32 holds, found '-1e20' in row 2"),
        ([True, False], "expected numbers, found bool"),
    ],
)
def test_a_label_that_is_no_number_is_named_by_row(labels, expected):
    assert expected in faults_of(labels, config=NUMBERS)[0]
