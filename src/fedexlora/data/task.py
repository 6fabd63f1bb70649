"""A task: how rows become tokens and labels, what model they need, and how it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedexlora.data.batches import Collator, Progress
from fedexlora.data.causal_lm import prepare_causal_lm
from fedexlora.data.chat import prepare_chat
from fedexlora.data.classification import prepare_classification
from fedexlora.data.config import (
    CausalLMTask,
    ChatTask,
    ClassificationTask,
    RegressionTask,
    TaskConfig,
)
from fedexlora.data.load import Splits
from fedexlora.data.regression import prepare_regression


class Task(Protocol):
    """One kind of task on one data set."""

    @property
    def config(self) -> Any:  # noqa: ANN401 - each kind has its own
        """The task's configuration."""

    @property
    def peft_task_type(self) -> str:
        """What peft calls the task: ``"SEQ_CLS"`` or ``"CAUSAL_LM"``."""

    @property
    def partition_column(self) -> str | None:
        """The column of classes that clients may be divided by; None if the task has none."""

    @property
    def model_config(self) -> Mapping[str, Any]:
        """What the task changes in the model's own configuration."""

    @property
    def notes(self) -> list[str]:
        """What is odd about the rows, and yet no fault."""

    def tokenize(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Rows of either split as tokens, in the same order, in memory.

        Returns:
            The columns ``input_ids``, ``attention_mask``, ``labels``, ``length`` (the number of
            tokens) and ``cut`` (what ``max_length`` took, see `fedexlora.data.cuts`); for pairs of
            texts also ``token_type_ids``, if the tokenizer makes them.

        Raises:
            DataError: if the tokenizer cannot serve the task, or a row has nothing to learn.
        """

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Makes a batch of tensors, padded to its longest row, of tokenized rows."""

    def evaluate(
        self,
        model: nn.Module,
        tokenized: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """Every metric of the task, and ``"loss"``; the model is left as it was.

        Args:
            model: on any device, in any mode.
            tokenized: what `tokenize` returned.
            tokenizer: the one that it was tokenized with.
            batch_size: most rows of a batch; the metrics do not depend on it beyond rounding.
            progress: called after each batch with the rows done and all rows.
        """


def prepare_task(config: TaskConfig, splits: Splits) -> Task:
    """Check the splits against the task, and learn from them what it needs to know.

    Args:
        config: the task.
        splits: the rows of the run; the labels are those of the training rows.

    Raises:
        DataError: if a column is missing, of another type or without a value in some row, or a
            label is not one of the task; lists all faults.
    """
    match config:
        case ClassificationTask():
            return prepare_classification(config, splits)
        case RegressionTask():
            return prepare_regression(config, splits)
        case CausalLMTask():
            return prepare_causal_lm(config, splits)
        case ChatTask():
            return prepare_chat(config, splits)


def stated(task: Task) -> TaskConfig:
    """A task's configuration, with what it learned from the rows and the model written out.

    Whoever prepares the task from that and other rows numbers the labels alike.
    """
    config: TaskConfig = task.config
    return config
