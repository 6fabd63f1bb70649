"""Classification and regression."""

import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from fedexlora.data.config import ClassificationTask, DataConfig, RegressionTask
from fedexlora.data.load import Splits, load_splits
from fedexlora.data.task import prepare_task
from fedexlora.data.tokenizer import prepare_tokenizer
from fedexlora.errors import DataError
from tests.data.loading import model_for


def text(length, offset=0):
    return " ".join(f"w{(i * 7 + offset) % 20}" for i in range(length))


ROWS = [
    {"a": text(1 + i % 11, i), "b": text(1 + i % 3, i), "label": "xyz"[i % 3], "score": i / 4}
    for i in range(17)
]
LETTERS = ClassificationTask(text="a", metrics=("accuracy", "f1", "matthews"))
NUMBERS = RegressionTask(text=("a", "b"), label="score", metrics=("pearson", "spearman", "mse"))


def error_of(config, splits):
    with pytest.raises(DataError) as caught:
        prepare_task(config, splits)
    return caught.value


def no_value(place, row):
    found = f"found none in 1 row(s), the first is row {row}"
    return f"{place}: expected a value in every row, {found}"


def unknown(split, label):
    found = f"found {label!r} in 1 row(s), the first is row 2"
    return f"{split}, column 'label': expected one of 'x', 'y', {found}"


def one_by_one(model, tokenized):
    """Logits ``(n, outputs)`` without padding or batches, in float64."""
    model = model.double().eval()
    inputs = [x for x in ("input_ids", "token_type_ids") if x in tokenized.column_names]
    with torch.no_grad():
        logits = [
            model(**{x: torch.tensor([row[x]]) for x in inputs}).logits[0] for row in tokenized
        ]
    model.float()
    return torch.stack(logits).numpy()


def test_classes_are_the_sorted_labels_of_the_training_rows(splits, bert):
    task = prepare_task(LETTERS, splits(ROWS))
    tokenized = task.tokenize(Dataset.from_list(ROWS), prepare_tokenizer(bert, None))
    assert task.labels == ("x", "y", "z")
    assert tokenized["labels"][:] == [i % 3 for i in range(17)]
    assert (task.partition_column, task.peft_task_type) == ("label", "SEQ_CLS")


def test_given_labels_set_the_order_of_the_classes(splits, bert):
    task = prepare_task(LETTERS.model_copy(update={"labels": ("z", "q", "x", "y")}), splits(ROWS))
    tokenized = task.tokenize(Dataset.from_list(ROWS[:3]), prepare_tokenizer(bert, None))
    assert task.labels == ("z", "q", "x", "y")
    assert tokenized["labels"][:] == [2, 3, 0]
    model = model_for(task, bert)
    assert model.config.id2label == {0: "z", 1: "q", 2: "x", 3: "y"}
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (None, ("no", "yes"), [1, 0, 1]),
        (("yes", "no"), ("yes", "no"), [0, 1, 0]),
        ((1, 0), ("1", "0"), [0, 1, 0]),
    ],
)
def test_a_hub_columns_own_label_names_are_used(labels, names, expected, bert):
    features = Features({"a": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"a": ["w1", "w2", "w3"], "label": [1, 0, 1]}, features=features)
    task = prepare_task(ClassificationTask(text="a", labels=labels), Splits(rows, rows, ""))
    assert task.labels == names
    assert task.tokenize(rows, prepare_tokenizer(bert, None))["labels"][:] == expected


@pytest.mark.parametrize("values", [[False, True], [3, 7]])
def test_labels_may_be_booleans_or_any_whole_numbers(values, splits, bert):
    rows = [{"a": "w1", "label": value} for value in values]
    task = prepare_task(ClassificationTask(text="a"), splits(rows))
    assert task.labels == tuple(map(str, values))
    tokenized = task.tokenize(Dataset.from_list(rows), prepare_tokenizer(bert, None))
    assert tokenized["labels"][:] == [0, 1]


def test_single_texts_have_no_token_types(splits, bert):
    tokenizer = prepare_tokenizer(bert, None)
    config = ClassificationTask(text="a", max_length=6)
    tokenized = prepare_task(config, splits(ROWS)).tokenize(Dataset.from_list(ROWS), tokenizer)
    assert tokenized.column_names == ["input_ids", "attention_mask", "labels", "cut", "length"]
    assert tokenized["length"][:] == [min(6, 3 + i % 11) for i in range(17)]
    assert tokenized.cache_files == []


def test_two_texts_are_a_pair(splits, bert):
    tokenizer = prepare_tokenizer(bert, None)
    row = prepare_task(NUMBERS, splits(ROWS)).tokenize(Dataset.from_list(ROWS[1:2]), tokenizer)[0]
    words = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert words == ["[CLS]", "w1", "w8", "[SEP]", "w1", "w8", "[SEP]"]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert row["labels"] == 0.25


def test_a_batch_is_padded_to_its_longest_row(splits, bert):
    tokenizer = prepare_tokenizer(bert, None)
    task = prepare_task(NUMBERS, splits(ROWS))
    tokenized = task.tokenize(Dataset.from_list(ROWS), tokenizer)
    batch = task.collator(tokenizer)([tokenized[0], tokenized[1]])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    assert batch["labels"].dtype == torch.float32


@pytest.mark.parametrize("folder", ["bert", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_classification_metrics_equal_those_of_single_rows(folder, batch_size, splits, request):
    path = request.getfixturevalue(folder)
    tokenizer, task = prepare_tokenizer(path, None), prepare_task(LETTERS, splits(ROWS))
    torch.manual_seed(1)
    model = model_for(task, path, tokenizer.pad_token_id)
    tokenized = task.tokenize(Dataset.from_list(ROWS), tokenizer)
    measured = task.evaluate(model, tokenized, tokenizer, batch_size)
    logits, labels = one_by_one(model, tokenized), np.array(tokenized["labels"][:])
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(17), labels]
    assert set(measured) == {"loss", "accuracy", "f1", "matthews"}
    assert measured["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert measured["accuracy"] == pytest.approx((logits.argmax(axis=1) == labels).mean())


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_regression_metrics_equal_those_of_single_rows(batch_size, splits, bert):
    tokenizer, task = prepare_tokenizer(bert, None), prepare_task(NUMBERS, splits(ROWS))
    torch.manual_seed(1)
    model = model_for(task, bert, tokenizer.pad_token_id)
    tokenized = task.tokenize(Dataset.from_list(ROWS), tokenizer)
    measured = task.evaluate(model, tokenized, tokenizer, batch_size)
    predicted, expected = one_by_one(model, tokenized)[:, 0], np.arange(17) / 4
    assert set(measured) == {"loss", "pearson", "spearman", "mse"}
    assert measured["loss"] == measured["mse"]
    assert measured["mse"] == pytest.approx(((predicted - expected) ** 2).mean(), rel=1e-5)
    assert measured["pearson"] == pytest.approx(np.corrcoef(predicted, expected)[0, 1], rel=1e-4)
    assert task.partition_column is None


def test_the_models_own_loss_is_the_loss_that_is_measured(splits, bert):
    tokenizer = prepare_tokenizer(bert, None)
    for config in (LETTERS, NUMBERS):
        task = prepare_task(config, splits(ROWS))
        model = model_for(task, bert, tokenizer.pad_token_id).eval()
        tokenized = task.tokenize(Dataset.from_list(ROWS), tokenizer)
        own = model(**task.collator(tokenizer)(list(tokenized))).loss.item()
        assert task.evaluate(model, tokenized, tokenizer, 17)["loss"] == pytest.approx(
            own, rel=1e-5
        )


def test_evaluation_reports_progress_and_restores_every_modules_mode(splits, bert):
    tokenizer, task = prepare_tokenizer(bert, None), prepare_task(LETTERS, splits(ROWS))
    model = model_for(task, bert).train()
    model.bert.embeddings.eval()
    before = [module.training for module in model.modules()]
    seen = []
    tokenized = task.tokenize(Dataset.from_list(ROWS), tokenizer)
    first = task.evaluate(model, tokenized, tokenizer, 7, lambda done, of: seen.append((done, of)))
    assert seen == [(7, 17), (14, 17), (17, 17)]
    assert [module.training for module in model.modules()] == before
    assert task.evaluate(model, tokenized, tokenizer, 7) == first  # dropout is off
    assert all(math.isfinite(x) for x in first.values())


def test_all_faults_of_a_classification_are_listed(splits):
    train = [{"a": "w1", "b": None, "label": "x"}, {"a": "w2", "b": "w", "label": "y"}]
    validation = [{"a": 3, "label": "x"}, {"a": 4, "label": "new"}, {"a": 5, "label": None}]
    error = error_of(ClassificationTask(text=("a", "b")), splits(train, validation))
    assert list(error.faults) == [
        "validation: expected a column 'b', found a, label",
        no_value("training, column 'b'", 1),
        "validation, column 'a': expected text, found int64",
        no_value("validation, column 'label'", 3),
        unknown("validation", "new"),
    ]


def test_a_fault_of_a_side_that_has_one_split_is_listed_once():
    rows = Dataset.from_list([{"a": "w1", "label": "x"}, {"a": "w2", "label": "email"}])
    with pytest.raises(DataError) as caught:
        prepare_task(ClassificationTask(text="a", labels=("x", "y")), Splits.one("training", rows))
    assert list(caught.value.faults) == [unknown("training", "email")]


def test_training_labels_must_be_among_the_given_ones(splits):
    error = error_of(LETTERS.model_copy(update={"labels": ("x", "y")}), splits(ROWS))
    assert "training, column 'label': expected one of 'x', 'y', found 'z' in 5 row(s)" in str(error)


def test_labels_that_are_no_classes_are_refused(splits):
    error = error_of(ClassificationTask(text="a", label="score"), splits(ROWS))
    assert "expected text, whole numbers or booleans as labels, found float64" in str(error)
    error = error_of(LETTERS, splits([{"a": "w1", "label": "x"}]))
    assert "expected at least two labels, found 'x'" in str(error)


def test_all_faults_of_a_regression_are_listed(splits):
    train = [{"a": "w", "score": math.inf}, {"a": "w", "score": None}, {"a": "w", "score": 1.0}]
    validation = [{"a": "w", "score": "high"}]
    error = error_of(RegressionTask(text="a", label="score"), splits(train, validation))
    assert list(error.faults) == [
        no_value("training, column 'score'", 2),
        "training, column 'score': expected finite numbers, found inf in row 1 (1 such row(s))",
        "validation, column 'score': expected numbers, found 'high' in row 1 (1 such row(s))",
    ]


def test_real_data_fit_their_tasks(real_data):
    def labels(name, config):
        splits = load_splits(DataConfig(source=str(real_data / name)), 0)
        return prepare_task(config, splits).model_config["id2label"]

    pair = ("sentence1", "sentence2")
    binary = {0: "0", 1: "1"}
    assert labels("cola", ClassificationTask(text="sentence", metrics=("matthews",))) == binary
    assert labels("rte", ClassificationTask(text=pair)) == binary
    assert labels("stsb", RegressionTask(text=pair)) == {0: "label"}
