"""What every task of a causal language model shares: tokens, of which some are targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedexlora.data.batches import Collator, Progress
from fedexlora.data.prompts import Prompts
from fedexlora.data.token_loss import label_collator, token_metrics


class LanguageTask(ABC):
    """A task of a causal language model; see ``fedexlora.data.task.Task`` for its members.

    It has no state: each kind is a dataclass with its own configuration.
    """

    __slots__ = ()

    config: Any
    """The task's configuration: each kind has its own."""

    @property
    def peft_task_type(self) -> str:
        """What peft calls the task."""
        return "CAUSAL_LM"

    @property
    def partition_column(self) -> None:
        """Texts are no classes: there is no column to divide by."""
        return

    @property
    def model_config(self) -> dict[str, Any]:
        """Nothing: the model is used as it is."""
        return {}

    @property
    def notes(self) -> list[str]:
        """None."""
        return []

    @abstractmethod
    def tokenize(self, rows: Dataset, tokenizer: Tokenizer) -> Dataset:
        """Rows as tokens; ``labels`` are ``IGNORED`` where a token is no target."""

    @abstractmethod
    def prompts(self, rows: Dataset, tokenizer: Tokenizer) -> Prompts:
        """What the model reads before it writes, of rows to be scored by that.

        Raises:
            DataError: if some row has no prompt or no answer.
        """

    def collator(self, tokenizer: Tokenizer) -> Collator:
        """Makes a padded batch; ``labels`` are ``(n, tokens)`` int64, ``IGNORED`` in padding."""
        return label_collator(tokenizer)

    def evaluate(
        self,
        model: nn.Module,
        tokenized: Dataset,
        tokenizer: Tokenizer,
        batch_size: int,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """``"loss"``, the mean over all targets, and ``"perplexity"``, if asked for.

        Every token counts the same, whichever row or batch it is in; summed in float64.
        """
        collate, metrics = self.collator(tokenizer), self.config.metrics
        return token_metrics(model, tokenized, collate, batch_size, metrics, progress)
