"""Evaluation of a finished run, an adapter or a plain model on a recipe's task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fedexlora.adapters.finished_run import FinishedRun, read_finished
from fedexlora.adapters.rescore import rescore
from fedexlora.errors import InputError
from fedexlora.exchange.adapter_records import EvaluationRecord
from fedexlora.peft_bridge.adapter_config import CONFIG
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.recipe import Recipe, load_recipe
from fedexlora.rounds.scoring import all_scorers

Kind = Literal["run", "adapter", "model"]
_RECIPE = "recipe.toml"


def evaluate(
    source: str,
    task: Path | None = None,
    overrides: Sequence[str] = (),
    observer: Observer | None = None,
) -> EvaluationRecord:
    """Score something finished on the validation rows of a recipe; nothing is written.

    Args:
        source: the folder of a finished run or of an adapter, or a model as ``model.source`` names
            it.
        task: the recipe; a run's own if not given. Its model is replaced by what is scored: the
            model itself, the run's, or the one that the adapter names.
        overrides: ``table.key=value``, before all of that.
        observer: told of progress.

    Raises:
        InputError: if the source, the recipe or its data cannot be used, or do not fit together.
    """
    path = Path(source).expanduser()
    kind = _kind(path)
    run = read_finished(path) if kind == "run" else None
    recipe = _recipe(source, kind, task, overrides)
    if run is not None and task is None:
        recipe = _with_labels(recipe, run)
    adapter = {"run": path / "adapter", "adapter": path, "model": None}[kind]
    scored = rescore(recipe, adapter, observer=observer)
    return EvaluationRecord(
        source=source,
        kind=kind,
        base=recipe.model.source,
        rows=scored.rows,
        metrics=dict(sorted(scored.metrics.items())),
        recorded=_recorded(recipe, run),
        scorers=all_scorers(recipe),
    )


def _kind(path: Path) -> Kind:
    if (path / _RECIPE).is_file():
        return "run"
    return "adapter" if (path / CONFIG).is_file() else "model"


def _recipe(source: str, kind: Kind, task: Path | None, overrides: Sequence[str]) -> Recipe:
    """The recipe, with what is scored as its model.

    Raises:
        InputError: if there is none, or the adapter's base is not there.
    """
    own = Path(source).expanduser() / _RECIPE
    if kind == "run":
        model = load_recipe(own).model.model_dump(exclude_none=True) if task else {}
        return load_recipe(task or own, overrides, model)
    if task is None:
        raise InputError(f"{source}: an adapter or a model is scored on a task: --task RECIPE.toml")
    recipe = load_recipe(task, overrides)
    if kind == "adapter" and _sets_model(overrides):
        return recipe
    base = {"source": source} if kind == "model" else _base(Path(source).expanduser())
    # The same model keeps the revision that the recipe pins.
    if base.get("source") in (None, recipe.model.source):
        return recipe
    return load_recipe(task, overrides, {"revision": None, **base})


def _sets_model(overrides: Sequence[str]) -> bool:
    return any(x.partition("=")[0].strip() == "model.source" for x in overrides)


def _base(adapter: Path) -> dict[str, Any]:
    """The base that an adapter names, and its revision.

    Raises:
        InputError: if the adapter cannot be read, or names a folder that is not there.
    """
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        named, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{adapter / CONFIG} cannot be read: {error}") from error
    if not named:
        return {}
    if str(named).startswith((".", "/", "~")) and not Path(named).expanduser().is_dir():
        raise InputError(
            f"{adapter}: its base is a folder that is not here: {named}",
            ["name the base: --set model.source=MODEL"],
        )
    return {"source": str(named), "revision": revision}


def _with_labels(recipe: Recipe, run: FinishedRun) -> Recipe:
    """The recipe with the labels that the run found, so that its training rows are not needed."""
    names = run.header["model_config"].get("id2label", {})
    if recipe.task.kind != "classification" or recipe.task.labels is not None:
        return recipe
    labels = tuple(str(names[number]) for number in sorted(names, key=int))
    task = recipe.task.model_copy(update={"labels": labels})
    return recipe.model_copy(update={"task": task})


def _recorded(recipe: Recipe, run: FinishedRun | None) -> dict[str, float] | None:
    """The scores of a run's last round, if they are of the same task, rows and arithmetic."""
    if run is None:
        return None
    own = _with_labels(run.recipe, run)
    same = all(getattr(own, x) == getattr(recipe, x) for x in ("model", "task", "data"))
    same = same and own.evaluation.sets == recipe.evaluation.sets
    if not same or own.scoring_dtype != recipe.scoring_dtype:
        return None
    return dict(run.records[-1].metrics)
