"""Classification: one of several labels for a text or a pair of texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedexlora.data import metrics
from fedexlora.data.batches import Collator, Progress
from fedexlora.data.checks import dtype, missing_columns, named_splits, null_faults, text_faults
from fedexlora.data.config import ClassificationTask
from fedexlora.data.load import Splits
from fedexlora.data.sequence import encode_rows, padding_collator, predict, text_columns
from fedexlora.errors import DataError

Label: TypeAlias = str | int

_LABELS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Classification:
    """A classification task; see ``fedexlora.data.task.Task`` for what its members do."""

    config: ClassificationTask
    classes: Mapping[Label, int]
    """The model's class, from 0, of each value of the label column."""
    labels: tuple[str, ...]
    """The names of the classes, in order."""

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

    def tokenize(self, rows: Dataset, tokenizer: Tokenizer) -> Dataset:
        """Rows as tokens; ``labels`` are classes, int64."""
        config, classes = self.config, self.classes
        return encode_rows(
            rows,
            tokenizer,
            config.text,
            config.max_length,
            lambda batch: [classes[value] for value in batch[config.label]],
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
    classes: dict[Label, int] = {}
    names: tuple[str, ...] = ()
    if not odd and label in splits.train.column_names:
        classes, names = _classes(config, splits.train)
        odd = _value_faults(splits, label, classes, len(names))
    if faults or odd:
        raise DataError("the data set does not fit the classification task", [*faults, *odd])
    return Classification(config, classes, names)


def _classes(
    config: ClassificationTask, train: Dataset
) -> tuple[dict[Label, int], tuple[str, ...]]:
    feature = train.features[config.label]
    names = feature.names if isinstance(feature, ClassLabel) else []
    values: list[Label]
    if config.labels is not None:
        # A column with named labels holds their numbers; a recipe may give either.
        values = [names.index(x) if x in names else x for x in config.labels]
        names = [str(x) for x in config.labels]
    elif names:
        values = list(range(len(names)))
    else:
        values = sorted({x for x in train[config.label][:] if x is not None})
        names = [str(x) for x in values]
    return {value: i for i, value in enumerate(values)}, tuple(names)


def _type_faults(split: str, rows: Dataset, column: str) -> list[str]:
    if column not in rows.column_names:
        return []
    found = dtype(rows, column)
    if not re.fullmatch(r"(large_)?string|u?int\d+|bool", found):
        expected = "text, whole numbers or booleans as labels"
        return [f"{split}, column {column!r}: expected {expected}, found {found}"]
    return []


def _value_faults(
    splits: Splits, column: str, classes: Mapping[Label, int], count: int
) -> list[str]:
    faults = []
    if count < 2:
        faults.append(
            f"training, column {column!r}: expected at least two labels, "
            f"found {', '.join(map(repr, classes)) or 'none'}"
        )
    known = _shown(list(classes))
    for split, rows in named_splits(splits):
        if column in rows.column_names:
            values = rows[column][:]
            faults += null_faults(split, column, values)
            unknown = Counter(x for x in values if x is not None and x not in classes)
            if unknown:
                faults.append(
                    f"{split}, column {column!r}: expected one of {known}, "
                    f"found {_shown(list(unknown))} in {unknown.total()} row(s)"
                )
    return faults


def _shown(labels: list[Label]) -> str:
    more = ", ..." if len(labels) > _LABELS_SHOWN else ""
    return ", ".join(map(repr, labels[:_LABELS_SHOWN])) + more
