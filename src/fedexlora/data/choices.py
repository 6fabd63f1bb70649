"""Evaluation by likelihood: which of a row's possible answers the model finds likeliest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedexlora.data.batches import Progress, map_batches
from fedexlora.data.causal_lm import CausalLM
from fedexlora.data.checks import missing_columns, text_faults
from fedexlora.data.config import CHOICE_ACCURACY
from fedexlora.data.cuts import Cut
from fedexlora.data.load import Splits
from fedexlora.data.task import Task
from fedexlora.data.template import fill
from fedexlora.data.token_loss import IGNORED
from fedexlora.errors import DataError


@dataclass(frozen=True, slots=True)
class Choices:
    """Every possible answer of every row, as a row of its own."""

    task: CausalLM
    tokenized: Dataset
    """One row for each answer of each row, longest first."""
    rows: Sequence[int]
    """By tokenised row, whose answer it is, from 0."""
    right: Sequence[bool]
    """By tokenised row, whether it is the right answer."""

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        batch_size: int,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """The share of rows whose right answer is the likeliest: all tokens of it, and its end."""
        collate = self.task.collator(tokenizer)
        scores = map_batches(
            model, self.tokenized, collate, batch_size, _likelihoods, progress, use_cache=False
        )
        best: dict[int, tuple[float, bool]] = {}
        likelihoods = (x for batch in scores for x in batch.tolist())
        for row, right, score in zip(self.rows, self.right, likelihoods, strict=True):
            # The right answer has to be likelier than all others.
            held = best.get(row, (-np.inf, False))
            best[row] = max(held, (score, right), key=lambda x: (x[0], not x[1]))
        return {CHOICE_ACCURACY: sum(right for _, right in best.values()) / len(best)}


def prepare_choices(task: Task, rows: Dataset, tokenizer: Tokenizer) -> Choices | None:
    """The possible answers of rows; None if the task names none.

    Raises:
        DataError: if the right answer of a row is none of its possible ones, or it has only one.
    """
    if not isinstance(task, CausalLM) or task.config.choices is None:
        return None
    config, completion = task.config.choices, str(task.config.completion)
    golds = _golds(config.reference or completion, rows)
    prompts = task.texts(rows.select_columns(list(task.config.columns))[:])[0]
    offered = [[x for x in config.answers if _names(prompt, x)] for prompt in prompts]
    faults = [
        f"row {i}: expected the right answer, {gold!r}, among others that the prompt names; "
        f"found {', '.join(found) or 'none'}"
        for i, (gold, found) in enumerate(zip(golds, offered, strict=True), 1)
        if gold not in found or len(found) < 2
    ]
    if faults:
        more = [f"and {len(faults) - 5} more rows"] if len(faults) > 5 else []
        raise DataError("the rows do not fit task.choices", [*faults[:5], *more])
    pairs = [(i, answer) for i, found in enumerate(offered) for answer in found]
    texts = fill(config.template, {"choice": [answer for _, answer in pairs]}, len(pairs))
    expanded = rows.select([i for i, _ in pairs]).remove_columns(completion)
    tokenized = task.tokenize(expanded.add_column(completion, texts), tokenizer)
    if Cut.ANSWER_END in tokenized["cut"][:]:
        raise DataError("task.max_length cuts the answers of task.choices; raise it")
    order = np.argsort(-np.asarray(tokenized["length"][:]), kind="stable").tolist()
    right = [answer == golds[i] for i, answer in pairs]
    return Choices(
        task, tokenized.select(order), [pairs[i][0] for i in order], [right[i] for i in order]
    )


def _golds(column: str, rows: Dataset) -> list[str]:
    splits = Splits.one("validation", rows)
    faults = missing_columns(splits, [column]) or text_faults(splits, [column])
    if faults:
        raise DataError("the right answers of task.choices", faults)
    golds: list[str] = rows[column][:]
    return golds


def _names(prompt: str, answer: str) -> bool:
    """Whether a prompt has an answer as a word, or words, of its own."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", prompt) is not None


def _likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-likelihood of each row's targets, ``(n,)`` float64."""
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    # Only targets are widened to float32: all logits of a batch may not fit twice.
    losses = cross_entropy(logits[:, :-1][chosen].float(), targets[chosen], reduction="none")
    rows = chosen.nonzero()[:, 0].cpu()
    found = torch.zeros(len(labels), dtype=torch.float64)
    return found.index_add(0, rows, -losses.double().cpu())
