"""Scores of an exported adapter or model, loaded as its users load it."""

from __future__ import annotations

from pathlib import Path

from fedexlora.engine.observer import Observer
from fedexlora.engine.prepare import prepare
from fedexlora.engine.recipe import Recipe
from fedexlora.peft_bridge.load import load_merged, with_adapter


def rescore(recipe: Recipe, folder: Path, *, merged: bool) -> dict[str, float]:
    """Score what was exported on the run's own validation rows.

    Args:
        recipe: of the run; its data has to be where it was.
        folder: the adapter, or the merged model.
        merged: which of the two.

    Raises:
        InputError: if the recipe's data or model is not there any more.
    """
    prepared, _ = prepare(recipe, Observer())
    if merged:
        model = load_merged(folder, prepared.task.peft_task_type, recipe.model.dtype)
    else:
        model = with_adapter(prepared.model.peft_model.unload(), folder)
    return prepared.evaluate(Observer(), model)
