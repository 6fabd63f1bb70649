"""A client's scores of a version on its own held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datasets import Dataset
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from fedexlora.data.task import Task
from fedexlora.data.token_loss import IGNORED
from fedexlora.exchange.records import ClientScores
from fedexlora.peft_bridge.arithmetic import Arithmetic


@dataclass(frozen=True, slots=True)
class RowScorer:
    """Scores a live model on tokenised rows."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    arithmetic: Arithmetic

    def scores(self, model: Module, rows: Dataset) -> ClientScores:
        """Every metric of the task, and what its means are over; the model is left as it was."""
        with self.arithmetic.active(next(model.parameters()).device):
            metrics = self.task.evaluate(model, rows, self.tokenizer, self.batch_size)
        return ClientScores(rows=len(rows), targets=_targets(rows), metrics=metrics)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The rows that clients of a process do not train on, and what scores versions on them."""

    scorer: RowScorer
    rows: Dataset
    """Tokenised, of all clients."""
    shares: Mapping[str, Sequence[int]]
    """By client, which of them it has."""
    every: int
    """Versions that are a multiple are scored before training."""

    def scores(self, client: str, model: Module) -> ClientScores:
        """Scores of a live model on the rows of one client, which are selected anew."""
        return self.scorer.scores(model, self.rows.select(self.shares[client]))


def _targets(rows: Dataset) -> int:
    """The tokens that are predicted, or the rows."""
    labels = rows["labels"][:]
    if not isinstance(labels[0], list):
        return len(labels)
    # The first token is never predicted, so its label is no target.
    return sum(x != IGNORED for row in labels for x in row[1:])
