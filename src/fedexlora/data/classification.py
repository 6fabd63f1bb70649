"""Classification: one of several labels for a text or a pair of texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

from datasets import ClassLabel, Dataset
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedexlora.data import metrics
from fedexlora.data.batches import Collator, Progress
from fedexlora.data.checks import dtype, missing_columns, named_splits, null_faults, text_faults
from fedexlora.data.config import ClassificationTask
from fedexlora.data.labels import Label, column_labels, in_order, label_text, look_alikes
from fedexlora.data.load import Splits
from fedexlora.data.sequence import encode_rows, padding_collator, predict, text_columns
from fedexlora.errors import DataError

_LABELS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Classification:
    """A classification task; see ``fedexlora.data.task.Task`` for what its members do."""

    config: ClassificationTask
    """With the labels, in the model's order."""
    by_number: bool = False
    """Whether the labels of a column of named ones are their numbers."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, in order."""
        return tuple(map(str, self.config.labels or ()))

    @property
    def peft_task_type(self) -> str:
        """What peft calls the task."""
        return "SEQ_CLS"

    @property
    def partition_column(self) -> str:
        """The label column."""
        return self.config.label

    @property
    def model_config(self) -> dict[str, Any]:
        """One output for each label, and the labels' names."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    @property
    def notes(self) -> list[str]:
        """Labels that are different ones by a hair."""
        return [
            f"labels that differ only in case, spaces or Unicode form are different labels: "
            f"{', '.join(map(repr, group))}"
            for group in look_alikes(self.labels)
        ]

    def ordered(self, labels: Sequence[str]) -> Classification:
        """The same task with its labels in another order."""
        stated = {str(x): x for x in self.config.labels or ()}
        values = tuple(stated[x] for x in labels)
        return replace(self, config=self.config.model_copy(update={"labels": values}))

    def tokenize(self, rows: Dataset, tokenizer: Tokenizer) -> Dataset:
        """Rows as tokens; ``labels`` are classes, int64."""
        config = self.config
        text = label_text(rows.features[config.label], by_number=self.by_number)
        classes: Mapping[str | None, int] = {name: i for i, name in enumerate(self.labels)}
        return encode_rows(
            rows,
            tokenizer,
            config.text,
            config.max_length,
            lambda batch: [classes[text(value)] for value in batch[config.label]],
            "int64",
        )

    def collator(self, tokenizer: Tokenizer) -> Collator:
        """Makes a padded batch; ``labels`` are ``(n,)`` int64."""
        return padding_collator(tokenizer)

    def evaluate(
        self,
        model: nn.Module,
        tokenized: Dataset,
        tokenizer: Tokenizer,
        batch_size: int,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """The metrics and ``"loss"``, the mean cross entropy, in float64."""
        logits, labels = predict(model, tokenized, tokenizer, batch_size, progress)
        predicted, expected = logits.argmax(dim=-1).numpy(), labels.numpy()
        measured = {"loss": float(cross_entropy(logits, labels))}
        for name in self.config.metrics:
            if name != "loss":
                metric = metrics.CLASSIFICATION[name]
                measured[name] = metric(predicted, expected, len(self.labels))
        return measured


def prepare_classification(config: ClassificationTask, splits: Splits) -> Classification:
    """Check the columns of both splits, and number the labels.

    Raises:
        DataError: with all faults.
    """
    texts, label = text_columns(config.text), config.label
    faults = missing_columns(splits, (*texts, label)) + text_faults(splits, texts)
    odd = [x for split, rows in named_splits(splits) for x in _type_faults(split, rows, label)]
    task = Classification(config)
    if not odd and label in splits.train.column_names:
        task = _with_labels(config, splits.train)
        odd = _value_faults(splits, task)
    if faults or odd:
        raise DataError("the data set does not fit the classification task", [*faults, *odd])
    return task


def _with_labels(config: ClassificationTask, train: Dataset) -> Classification:
    """The task with the labels that the recipe states, the hub has, or the rows hold."""
    feature = train.features[config.label]
    if config.labels is not None:
        # A column with named labels holds their numbers; a recipe may give either.
        by_number = isinstance(feature, ClassLabel) and all(type(x) is int for x in config.labels)
        return Classification(config, by_number)
    found: tuple[Label, ...]
    if isinstance(feature, ClassLabel):
        found = tuple(feature.names)
    else:
        texts = column_labels(train, config.label, by_number=False)
        found = in_order(x for x in texts if x is not None)
        if "int" in dtype(train, config.label):
            found = tuple(map(int, found))
    return Classification(config.model_copy(update={"labels": found}))


def _type_faults(split: str, rows: Dataset, column: str) -> list[str]:
    if column not in rows.column_names:
        return []
    found, place = dtype(rows, column), f"{split}, column {column!r}"
    if re.fullmatch(r"(large_)?string|u?int\d+|bool|null", found):
        return []
    more = ""
    if found.startswith("float"):
        values = [None if x is None or isnan(x) else x for x in rows[column][:]]
        present = [(row, x) for row, x in enumerate(values, 1) if x is not None]
        # A table's writer makes fractions of whole numbers where one is missing.
        if len(present) < len(values) and all(x.is_integer() for _, x in present):
            return null_faults(split, column, values)
        shown = next(((row, x) for row, x in present if not x.is_integer()), present[0])
        more = f", {shown[1]!r} in row {shown[0]}"
    return [f"{place}: expected text, whole numbers or booleans as labels, found {found}{more}"]


def _value_faults(splits: Splits, task: Classification) -> list[str]:
    faults, column, labels = [], task.config.label, task.labels
    if len(labels) < 2:
        faults.append(
            f"training, column {column!r}: expected at least two labels, "
            f"found {', '.join(map(repr, labels)) or 'none'}"
        )
    for split, rows in named_splits(splits):
        if column not in rows.column_names:
            continue
        values = column_labels(rows, column, by_number=task.by_number)
        faults += null_faults(split, column, values)
        known = {None, *labels}
        unknown = [(row, x) for row, x in enumerate(values, 1) if x not in known]
        if unknown:
            found = list(dict.fromkeys(str(x) for _, x in unknown))
            faults.append(
                f"{split}, column {column!r}: expected one of {_shown(labels)}, found "
                f"{_shown(found)} in {len(unknown)} row(s), the first is row {unknown[0][0]}"
            )
    return faults


def _shown(labels: Sequence[str]) -> str:
    more = ", ..." if len(labels) > _LABELS_SHOWN else ""
    return ", ".join(map(repr, labels[:_LABELS_SHOWN])) + more
