"""Rows of tokens: made in memory, padded a batch at a time, and run through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets
from torch import Tensor, nn

Batch: TypeAlias = dict[str, Tensor]
Collator: TypeAlias = Callable[[list[dict[str, Any]]], Batch]
Progress: TypeAlias = Callable[[int, int], None]
Score = TypeVar("Score")

_ROWS_AT_ONCE = 1000
_OF_ROWS = ("length", "cut")
_INPUTS = {"input_ids": "int32", "attention_mask": "int8", "token_type_ids": "int8"}


def tokenized(
    rows: Dataset,
    encode: Callable[[Mapping[str, list[Any]]], dict[str, list[Any]]],
    labels: Value | Sequence,
) -> Dataset:
    """Encode all rows; nothing is written to a cache.

    Args:
        rows: at least one row.
        encode: makes the columns ``input_ids``, ``attention_mask``, ``labels``, ``cut`` and, if the
            model reads them, ``token_type_ids``, from a batch of rows by column.
        labels: the datasets feature of the column ``labels``.

    Returns:
        The same rows in the same order, with those columns and ``length``, the number of tokens.
    """
    parts = []
    for batch in rows.iter(batch_size=_ROWS_AT_ONCE):
        columns = encode(batch)
        columns["length"] = [len(ids) for ids in columns["input_ids"]]
        inputs = {x: Sequence(Value(dtype)) for x, dtype in _INPUTS.items() if x in columns}
        own = {"labels": labels, "length": Value("int32"), "cut": Value("int8")}
        features = Features({**inputs, **own})
        parts.append(Dataset.from_dict(columns, features=features))
    return concatenate_datasets(parts)


def model_inputs(pad: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]) -> Collator:
    """A collator that pads rows, without ``length`` and ``cut``, which no model reads."""

    def collate(rows: list[dict[str, Any]]) -> Batch:
        return dict(pad([{k: v for k, v in row.items() if k not in _OF_ROWS} for row in rows]))

    return collate


def map_batches(
    model: nn.Module,
    rows: Dataset,
    collate: Collator,
    batch_size: int,
    score: Callable[[Tensor, Tensor], Score],
    progress: Progress | None = None,
    **options: bool,
) -> list[Score]:
    """Score every batch, longest rows first, so that too large a batch size fails at once.

    Args:
        model: is evaluated without gradients and in evaluation mode; left in the mode it was in.
        rows: tokenized rows.
        collate: makes a padded batch of rows.
        batch_size: most rows of a batch.
        score: what is kept of a batch's logits and labels; both are on the model's device.
        progress: called after each batch with the rows done and all rows.
        options: passed to the model.

    Returns:
        Each batch's score, in an order that depends on the rows alone.
    """
    device = next(model.parameters()).device
    order = np.argsort(-np.asarray(rows["length"][:]), kind="stable").tolist()
    scores = []
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen]).items()}
            labels = batch.pop("labels")
            scores.append(score(model(**batch, **options).logits, labels))
            if progress is not None:
                progress(start + len(chosen), len(order))
    return scores


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and afterwards each one back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
