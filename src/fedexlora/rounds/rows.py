"""A run's tokenised rows: checked against the model, and summed up for its header and watchers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedexlora.data.capacity import check_capacity
from fedexlora.data.cuts import CutRows
from fedexlora.data.task import Task
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.recipe import Recipe


@dataclass(frozen=True, slots=True)
class RowSummary:
    """What is known of the rows, beside how many there are."""

    cut: Mapping[str, CutRows]
    """By split: how many rows ``task.max_length`` cuts."""
    notes: Sequence[str]
    """What is odd, and yet no fault."""
    client_values: Mapping[str, str] = field(default_factory=dict)
    """By client: the value of the partition's column that it stands for."""

    def record(self) -> dict[str, Any]:
        """For ``run.json``, which stays in the run's folder."""
        return {
            "client_values": dict(self.client_values),
            "cut_rows": {split: rows.record() for split, rows in self.cut.items()},
            "notes": list(self.notes),
        }


def check_rows(
    recipe: Recipe,
    task: Task,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tokenized: Mapping[str, Dataset],
    notes: Sequence[str | None],
    observer: Observer,
) -> RowSummary:
    """Check tokenised rows against the model, count what was cut, and say what is odd.

    Args:
        recipe: the recipe.
        task: its task.
        model: the model that the rows are for.
        tokenizer: the one that they were tokenised with.
        tokenized: the rows by split.
        notes: what was found before.
        observer: told of every note.

    Raises:
        DataError: naming everything that the model cannot take.
    """
    half = recipe.model.dtype == "float16" or bool(recipe.training.get("fp16"))
    check_capacity(recipe.task, model, tokenizer, tokenized, half=half)
    cut = {split: CutRows.of(rows) for split, rows in tokenized.items()}
    length = recipe.task.max_length
    said = [*notes, *task.notes, *(x.note(split, length) for split, x in cut.items())]
    summary = RowSummary(cut, [x for x in said if x is not None])
    for what in summary.notes:
        observer.note(what)
    return summary
