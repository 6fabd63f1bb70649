"""Regression: a number for a text or a pair of texts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedexlora.data import metrics
from fedexlora.data.batches import Collator, Progress
from fedexlora.data.checks import dtype, missing_columns, named_splits, null_faults, text_faults
from fedexlora.data.config import RegressionTask
from fedexlora.data.load import Splits
from fedexlora.data.sequence import encode_rows, padding_collator, predict, text_columns
from fedexlora.errors import DataError

LARGEST = 9.2e18
"""Of a label: in float32 the square of an error twice as large is still finite."""

_NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Regression:
    """A regression task; see ``fedexlora.data.task.Task`` for what its members do."""

    config: RegressionTask

    @property
    def peft_task_type(self) -> str:
        """What peft calls the task."""
        return "SEQ_CLS"

    @property
    def partition_column(self) -> None:
        """Numbers are no classes: there is no column to divide by."""
        return

    @property
    def model_config(self) -> dict[str, Any]:
        """One output, named as the label column."""
        return {
            "num_labels": 1,
            "id2label": {0: self.config.label},
            "label2id": {self.config.label: 0},
            "problem_type": "regression",
        }

    @property
    def notes(self) -> list[str]:
        """None."""
        return []

    def tokenize(self, rows: Dataset, tokenizer: Tokenizer) -> Dataset:
        """Rows as tokens; ``labels`` are float32."""
        config = self.config
        return encode_rows(
            rows,
            tokenizer,
            config.text,
            config.max_length,
            lambda batch: [_number(x) for x in batch[config.label]],
            "float32",
        )

    def collator(self, tokenizer: Tokenizer) -> Collator:
        """Makes a padded batch; ``labels`` are ``(n,)`` float32."""
        return padding_collator(tokenizer)

    def evaluate(
        self,
        model: nn.Module,
        tokenized: Dataset,
        tokenizer: Tokenizer,
        batch_size: int,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """The metrics and ``"loss"``, the mean squared error, in float64."""
        logits, labels = predict(model, tokenized, tokenizer, batch_size, progress)
        predicted, expected = logits.squeeze(-1).numpy(), labels.double().numpy()
        measured = {"loss": metrics.mse(predicted, expected)}
        for name in self.config.metrics:
            if name != "loss":
                measured[name] = metrics.REGRESSION[name](predicted, expected)
        return measured


def prepare_regression(config: RegressionTask, splits: Splits) -> Regression:
    """Check the columns of both splits.

    Raises:
        DataError: with all faults.
    """
    texts = text_columns(config.text)
    faults = missing_columns(splits, (*texts, config.label)) + text_faults(splits, texts)
    for split, rows in named_splits(splits):
        if config.label in rows.column_names:
            faults += _number_faults(split, rows, config.label)
    if faults:
        raise DataError("the data set does not fit the regression task", faults)
    return Regression(config)


def _number_faults(split: str, rows: Dataset, column: str) -> list[str]:
    found, place = dtype(rows, column), f"{split}, column {column!r}"
    if not re.fullmatch(r"(large_)?string|u?int\d+|float\d+|null", found):
        return [f"{place}: expected numbers, found {found}"]
    values = rows[column][:]
    faults = null_faults(split, column, values)
    numbers = [None if x is None else _number(x) for x in values]
    for wanted, odd in (
        ("numbers", [i for i, x in enumerate(values) if x is not None and numbers[i] is None]),
        ("finite numbers", [i for i, x in enumerate(numbers) if x is not None and not isfinite(x)]),
        (
            f"numbers up to {LARGEST:.1e}, whose square float32 holds",
            [i for i, x in enumerate(numbers) if x is not None and LARGEST < abs(x) < inf],
        ),
    ):
        if odd:
            shown = f"found {values[odd[0]]!r} in row {odd[0] + 1} ({len(odd)} such row(s))"
            faults.append(f"{place}: expected {wanted}, {shown}")
    return faults


def _number(value: str | float) -> float | None:
    """The number that a cell holds; a text has to be one, with a point and without grouping."""
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value.strip()) else None
    return float(value)
