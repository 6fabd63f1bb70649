"""Scores of what is finished, loaded as users load it: an adapter, a merged or a plain model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fedexlora.data.load import Splits, load_splits, load_validation
from fedexlora.data.task import Task, prepare_task
from fedexlora.peft_bridge.adapter_file import open_adapter
from fedexlora.peft_bridge.inspect import check_new_weights
from fedexlora.peft_bridge.load import load_merged, with_adapter
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.rows import check_rows
from fedexlora.rounds.scoring import load_sets, prepare_scoring, scoring_device
from fedexlora.rounds.task_base import load_task_base


@dataclass(frozen=True, slots=True)
class Scored:
    """What was found on the validation rows."""

    metrics: dict[str, float]
    rows: int


def rescore(
    recipe: Recipe,
    folder: Path | None,
    *,
    merged: bool = False,
    observer: Observer | None = None,
) -> Scored:
    """Score a finished model on a recipe's validation rows.

    Args:
        recipe: names the base, the rows and the task; its data has to be where it was.
        folder: the adapter, or the merged model; None for the recipe's model as it is.
        merged: whether it is a merged model.
        observer: told of progress.

    Raises:
        InputError: if the recipe's data or model is not there, the adapter does not fit the model,
            or a model has weights that no file holds.
    """
    observer = observer or Observer()
    observer.preparing("reading the data")
    sets = load_sets(recipe)
    task, splits = _prepared_task(recipe)
    task, tokenizer, base, new, note = load_task_base(recipe, task, observer)
    model: nn.Module = base
    if merged and folder is not None:
        model = load_merged(folder, task.peft_task_type, recipe.model.dtype)
    elif folder is not None:
        if new:  # an adapter of any kind can be scored, but heads are looked for in plain LoRA
            check_new_weights(new, open_adapter(folder).dense)
        model = with_adapter(base, folder)
    else:
        check_new_weights(new, ())
    if recipe.model.quantization is None or merged:
        model.to(scoring_device(recipe))
    observer.preparing("tokenising the data")
    scoring = prepare_scoring(recipe, task, tokenizer, model, splits.validation, sets)
    tokenized = {"validation": scoring.validation}
    check_rows(recipe, task, model, tokenizer, tokenized, [note, *scoring.notes], observer)
    observer.preparing("scoring")
    return Scored(scoring.scores(model, observer), len(scoring.validation))


def _prepared_task(recipe: Recipe) -> tuple[Task, Splits]:
    """The task and the rows; the training rows only where the labels are to be read from them."""
    if recipe.task.kind == "classification" and recipe.task.labels is None:
        splits = load_splits(recipe.data, recipe.federation.seed)
    else:
        rows = load_validation(recipe.data, recipe.federation.seed)
        splits = Splits.one("validation", rows)
    return prepare_task(recipe.task, splits), splits
