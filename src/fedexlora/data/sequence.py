"""What classification and regression share: texts or pairs of texts, one label a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from datasets import Dataset, Value
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from fedexlora.data.batches import Collator, Progress, map_batches, model_inputs, tokenized
from fedexlora.data.cuts import Cut

Text: TypeAlias = str | tuple[str, str]


def text_columns(text: Text) -> tuple[str, ...]:
    """The names of the one or two text columns."""
    return (text,) if isinstance(text, str) else text


def encode_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    max_length: int,
    label: Callable[[Mapping[str, list[Any]]], list[Any]],
    dtype: str,
) -> Dataset:
    """Tokenize rows; two texts are given to the tokenizer as a pair.

    Args:
        rows: at least one row.
        tokenizer: the model's tokenizer.
        text: the text column, or the two of a pair.
        max_length: most tokens of a row; a longer text (of a pair: the longer one) loses its end.
        label: makes the labels of a batch of rows.
        dtype: of the column ``labels``.
    """
    columns = text_columns(text)

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [batch[column] for column in columns]
        tokens = tokenizer(*texts, truncation=True, max_length=max_length)
        kept = ["input_ids", "attention_mask"]
        if len(columns) == 2 and "token_type_ids" in tokens:
            kept.append("token_type_ids")  # BERT tells the two texts apart by them
        cut = _cut(tokenizer, texts, tokens["input_ids"], max_length)
        return {**{x: tokens[x] for x in kept}, "labels": label(batch), "cut": cut}

    return tokenized(rows, encode, Value(dtype))


def _cut(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[list[str]],
    ids: list[list[int]],
    max_length: int,
) -> list[int]:
    """Of every row, whether it has more tokens than were kept; only full rows can have."""
    cut = [int(Cut.NOTHING)] * len(ids)
    full = [row for row, x in enumerate(ids) if len(x) >= max_length]
    if full:
        # verbose: it would warn of texts longer than the model reads, which is what is asked here
        whole = tokenizer(*[[x[row] for row in full] for x in texts], verbose=False)["input_ids"]
        for row, tokens in zip(full, whole, strict=True):
            if len(tokens) > len(ids[row]):
                cut[row] = int(Cut.TEXT)
    return cut


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> Collator:
    """Pads a batch to its longest row."""
    return model_inputs(DataCollatorWithPadding(tokenizer))


def predict(
    model: nn.Module,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """All logits ``(n, classes)`` in float64, and the labels ``(n,)`` beside them, on the CPU."""

    def score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.double().cpu(), labels.cpu()

    collate = padding_collator(tokenizer)
    scores = map_batches(model, rows, collate, batch_size, score, progress)
    logits, labels = zip(*scores, strict=True)
    return torch.cat(logits), torch.cat(labels)
