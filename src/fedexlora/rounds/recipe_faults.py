"""What is wrong between the keys of a recipe whose tables are right, each by itself."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import TYPE_CHECKING

from pydantic import ValidationError

from fedexlora.methods import METHODS
from fedexlora.methods.method import Options

if TYPE_CHECKING:
    from fedexlora.rounds.recipe import Recipe
    from fedexlora.rounds.recipe_tables import ClientTable

_OF_ONE_CLIENT = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def table_faults(recipe: Recipe) -> list[str]:
    """Every fault between keys."""
    faults = _participation_faults(recipe) + _screening_faults(recipe) + _weight_faults(recipe)
    faults += _scoring_faults(recipe) + _loss_faults(recipe) + _place_faults(recipe)
    faults += _start_faults(recipe)
    for client, own in recipe.clients.items():
        faults += _client_faults(f'clients."{client}"', own, recipe)
    return faults


def method_faults(table: object) -> list[str]:
    """What is wrong with an unchecked ``[method]``: its name, and the method's options."""
    if not isinstance(table, dict):
        return []  # said of the table itself
    name = table.get("name", "fedex")
    if not isinstance(name, str):
        return []
    if name not in METHODS:
        return [f"method.name: {name!r} is no method; {nearest(name, METHODS)}"]
    options = METHODS[name].options
    given = {key: value for key, value in table.items() if key != "name"}
    try:
        options.model_validate(given)
    except ValidationError as error:
        return [_option_fault(name, options, e["type"], e["loc"], e["msg"]) for e in error.errors()]
    return []


def nearest(name: str, known: Collection[str]) -> str:
    """What somebody may have meant who wrote a name that there is not."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _option_fault(
    name: str, options: type[Options], kind: str, place: tuple[int | str, ...], said: str
) -> str:
    key = ".".join(map(str, place)) or name
    if kind == "extra_forbidden":
        known = list(options.model_fields)
        hint = nearest(key, known) if known else "it has none"
        return f"method.{key}: {name} has no such option; {hint}"
    text = said.removeprefix("Value error, ")
    return f"method.{key}: {text[0].lower()}{text[1:]}"


def _participation_faults(recipe: Recipe) -> list[str]:
    table, faults = recipe.federation, []
    if table.clients_per_round is not None and table.fraction is not None:
        faults.append("federation.fraction: give it or clients_per_round, not both")
    if table.clients_per_round is not None and table.min_updates > table.clients_per_round:
        faults.append(
            f"federation.min_updates: {table.min_updates} cannot come from "
            f"{table.clients_per_round} clients_per_round"
        )
    if table.stale == "accept":
        if not recipe.rule.late_updates:
            faults.append(
                f"federation.stale: {recipe.method.name} has no place for late updates; use fedex"
            )
        if table.history == 0:
            faults.append("federation.history: 0 keeps no version that a late update can be of")
    if both := sorted(set(table.allow or ()) & set(table.exclude)):
        faults.append(f"federation.exclude: {', '.join(both)} cannot be in federation.allow too")
    if (table.weighting == "capped") != (table.weight_cap is not None):
        faults.append("federation.weight_cap: needed by weighting = 'capped', and by no other")
    return faults


def _weight_faults(recipe: Recipe) -> list[str]:
    """What would change weights that the method does not look at."""
    table, name = recipe.federation, recipe.method.name
    if not recipe.rule.weighs_clients:
        return []
    faults = []
    if table.weighting != "examples":
        faults.append(f"federation.weighting: {name} weighs clients itself; leave it out")
    if table.robust in ("clip", "geometric_median"):
        faults.append(
            f"federation.robust: {table.robust} changes weights, and {name} weighs clients itself; "
            f"use multi_krum or trimmed_mean"
        )
    return faults


def _start_faults(recipe: Recipe) -> list[str]:
    """An initialisation that the method cannot start from."""
    known, found = recipe.rule.start, recipe.lora.get("init_lora_weights", True)
    if known is None or found in known:
        return []
    wanted, name = " or ".join(map(repr, known)), recipe.method.name
    return [f"lora.init_lora_weights: {name} starts from {wanted}, found {found!r}"]


def _scoring_faults(recipe: Recipe) -> list[str]:
    weights, scoring = recipe.model.dtype, recipe.scoring_dtype
    if weights in ("float32", scoring):
        return []
    said = f"evaluation.dtype: {weights} weights cannot be multiplied in {scoring}"
    return [f"{said}; leave it out, or set model.dtype = {scoring!r}"]


def _place_faults(recipe: Recipe) -> list[str]:
    """What needs validation rows at the server, where it has none."""
    where = recipe.evaluation.where
    if where == "server":
        return []
    patience = recipe.federation.patience
    asked = {
        "evaluation.sets": recipe.evaluation.sets,
        "evaluation.mean": recipe.evaluation.mean,
        "task.generation": getattr(recipe.task, "generation", None),
        "task.choices": getattr(recipe.task, "choices", None),
    }
    faults = [
        f"{key}: is scored on the server's rows, and evaluation.where is {where!r}; leave it out, "
        f"or set evaluation.where = 'server'"
        for key, value in asked.items()
        if value
    ]
    if where == "none" and patience is not None:
        faults.append("federation.patience: there are no scores, as evaluation.where is 'none'")
    return faults


def _loss_faults(recipe: Recipe) -> list[str]:
    if recipe.task.kind != "regression" or not recipe.training.get("label_smoothing_factor"):
        return []
    return ["training.label_smoothing_factor: numbers are no classes to be smoothed over"]


def _screening_faults(recipe: Recipe) -> list[str]:
    table, faults = recipe.federation, []
    if table.robust is not None and recipe.rule.local and recipe.rule.uploads(1):
        faults.append(
            f"federation.robust: with {recipe.method.name} clients send no changes of a model that "
            f"could be compared; leave it out"
        )
    if table.robust is not None and (recipe.rule.pooled or not recipe.rule.uploads(1)):
        name = recipe.method.name
        faults.append(f"federation.robust: {name} has no updates to compare; leave it out")
    rejects = table.robust in ("multi_krum", "trimmed_mean")
    if table.clip_norm is not None and table.robust != "clip":
        faults.append("federation.clip_norm: only with robust = 'clip'")
    if rejects != (table.bad_share is not None):
        faults.append(
            "federation.bad_share: needed by robust = 'multi_krum' or 'trimmed_mean', "
            "and by no other"
        )
    if table.robust in ("clip", "geometric_median") and recipe.rule.own_adapters:
        faults.append(
            f"federation.robust: {table.robust} rejects nobody, and with method.next_adapter = "
            f"'keep' clients would continue from any update; use multi_krum or trimmed_mean"
        )
    screening, most = recipe.screening, table.clients_per_round
    if not faults and screening is not None and most is not None:
        if short := screening.shortfall(most):
            faults.append(f"federation.clients_per_round: {short}")
        elif most - screening.bad(most) < table.min_updates:
            faults.append(
                f"federation.min_updates: {table.min_updates} cannot be left of {most} "
                f"clients_per_round after {screening.bad(most)} are rejected"
            )
    return faults


def _client_faults(key: str, table: ClientTable, recipe: Recipe) -> list[str]:
    faults = [
        f"{key}.lora.{name}: only a client's rank and scaling may differ "
        f"({', '.join(_OF_ONE_CLIENT)}); the rest is [lora], for all"
        for name in table.lora
        if name not in _OF_ONE_CLIENT
    ]
    if not recipe.rule.mixed_ranks:
        faults.append(f"{key}.lora: {recipe.method.name} needs one rank for all; use fedex")
    if recipe.lora.get("lora_bias"):
        faults.append(f"{key}.lora: not together with lora.lora_bias, which the scaling multiplies")
    return faults
