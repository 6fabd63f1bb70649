"""Targets among the tokens of a row, and the loss of predicting them: any causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf

from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedexlora.data.batches import Collator, Progress, map_batches, model_inputs
from fedexlora.errors import DataError

IGNORED = -100
"""The label of a token that is not a target, as torch and transformers have it."""

_LARGEST_EXPONENT = 709.0


def label_collator(tokenizer: Tokenizer) -> Collator:
    """Makes a padded batch; ``labels`` are ``(n, tokens)`` int64, ``IGNORED`` in padding."""
    return model_inputs(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED))


def token_metrics(
    model: nn.Module,
    tokenized: Dataset,
    collate: Collator,
    batch_size: int,
    metrics: Sequence[str],
    progress: Progress | None = None,
) -> dict[str, float]:
    """``"loss"``, the mean over all target tokens, and ``"perplexity"``, if asked for.

    Every token counts the same, whichever row or batch it is in; summed in float64.
    """
    scores = map_batches(
        model, tokenized, collate, batch_size, _token_loss, progress, use_cache=False
    )
    loss = sum(total for total, _ in scores) / sum(count for _, count in scores)
    measured = {"loss": loss}
    if "perplexity" in metrics:
        measured["perplexity"] = exp(loss) if loss <= _LARGEST_EXPONENT else inf
    return measured


def check_targets(rows: Dataset) -> None:
    """Refuse rows with nothing to learn.

    Raises:
        DataError: saying how many they are, and which is the first.
    """
    # The first token is never predicted, so its label is no target.
    bare = [i for i, labels in enumerate(rows["labels"][:], 1) if set(labels[1:]) <= {IGNORED}]
    if bare:
        raise DataError(
            f"expected a token to predict in every row, found none in {len(bare)} of {len(rows)}, "
            f"the first is row {bare[0]}; remove empty rows or raise task.max_length"
        )


def _token_loss(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    # Only targets are widened to float32: all logits of a batch may not fit twice.
    losses = cross_entropy(logits[:, :-1][chosen].float(), targets[chosen], reduction="none")
    return float(losses.double().sum()), int(chosen.sum())
