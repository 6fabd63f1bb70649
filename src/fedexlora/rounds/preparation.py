"""From a recipe to everything that its rounds need, loaded and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_utils import PreTrainedModel

from fedexlora.data.holdout import Holdout, hold_out
from fedexlora.data.load import Splits, fingerprint, load_splits, load_train, load_validation
from fedexlora.data.partition import client_values, split_clients
from fedexlora.data.task import Task, prepare_task
from fedexlora.errors import RecipeError
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.local.arguments import check_training_device, training_arithmetic
from fedexlora.local.clients import LocalClients
from fedexlora.local.jobs import local_job
from fedexlora.local.scoring import HeldOut, RowScorer
from fedexlora.peft_bridge.device import find_device
from fedexlora.peft_bridge.export import file_names, origin_of
from fedexlora.peft_bridge.inspect import check_new_weights
from fedexlora.peft_bridge.load import attach_lora, probe_shapes
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.holder import HolderMeasure
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.participation import AccessList
from fedexlora.rounds.prepared import (
    Prepared,
    check_clients,
    check_reduction_device,
    refuse_one_place,
)
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.recipe_tables import ClientTable
from fedexlora.rounds.rows import check_rows
from fedexlora.rounds.scoring import load_sets, prepare_scoring, scoring_arithmetic
from fedexlora.rounds.task_base import load_task_base


def prepare(recipe: Recipe, observer: Observer) -> tuple[Prepared, LocalClients]:
    """Load and check everything that a recipe names: the server's side, and all clients.

    Raises:
        DataError: if data, columns or partitions are wrong.
        RecipeError: if the recipe names a client that there is not, or trains in an arithmetic that
            this machine has not.
        BridgeError: if the model cannot be loaded or not be aggregated exactly.
    """
    observer.preparing("reading the data")
    sets = load_sets(recipe)
    splits = run_splits(recipe)
    task = prepare_task(recipe.task, splits)
    every = partition_shares(recipe, task, splits.train)
    check_clients(recipe, list(every))
    shares = admitted_shares(recipe, every)
    parted = part_rows(recipe, shares)
    task, tokenizer, model, specs, note = _load_model(recipe, task, recipe.clients, observer)
    observer.preparing("tokenising the data")
    rows = task.tokenize(splits.train, tokenizer)  # once: of many clients, each has few
    scoring, tokenized, notes = None, {"training": rows}, [note]
    if recipe.evaluation.where == "server":
        validation = splits.validation
        scoring = prepare_scoring(recipe, task, tokenizer, model.peft_model, validation, sets)
        tokenized |= {"validation": scoring.validation}
        notes += scoring.notes
    summary = check_rows(recipe, task, model.peft_model, tokenizer, tokenized, notes, observer)
    if not recipe.rule.pooled:
        values = client_values(splits.train, recipe.partition, shares)
        summary = replace(summary, client_values=values)
    # Every row that a number of the run comes from is part of its data.
    others = [own.rows for own in sets.values()]
    data = fingerprint(splits.train, splits.validation, *others) if others else splits.fingerprint
    held_out = _held_out(recipe, task, tokenizer, rows, parted)
    clients = _clients(recipe, task, tokenizer, model, rows, parted, specs, held_out)
    prepared = Prepared(
        recipe,
        specs,
        task,
        scoring,
        data_fingerprint=data,
        summary=summary,
        arithmetic=_arithmetic(recipe),
    )
    return _with_model(prepared, model), clients


def prepare_server(recipe: Recipe, observer: Observer) -> Prepared:
    """Load and check the server's side alone: the model and the validation rows.

    Raises:
        DataError: if the validation rows are missing or do not fit the task.
        RecipeError: if this machine has not the arithmetic in which clients train.
        BridgeError: if the model cannot be loaded or not be aggregated exactly.
    """
    observer.preparing("reading the data")
    sets = load_sets(recipe)
    rows = load_validation(recipe.data, recipe.federation.seed)
    task = prepare_task(recipe.task, Splits.one("validation", rows))
    task, tokenizer, model, specs, note = _load_model(recipe, task, recipe.clients, observer)
    observer.preparing("tokenising the data")
    scoring = prepare_scoring(recipe, task, tokenizer, model.peft_model, rows, sets)
    tokenized = {"validation": scoring.validation}
    summary = check_rows(
        recipe, task, model.peft_model, tokenizer, tokenized, [note, *scoring.notes], observer
    )
    data = fingerprint(rows, *(own.rows for own in sets.values()))
    return Prepared(
        recipe,
        specs,
        task,
        scoring,
        model,
        data_fingerprint=data,
        summary=summary,
        arithmetic=_arithmetic(recipe),
    )


def prepare_client(
    recipe: Recipe,
    client: str,
    share: str | None,
    observer: Observer,
    *,
    own_validation: bool = False,
) -> LocalClients:
    """Load and check one client's side: the model and its own rows.

    Args:
        recipe: with the client's own data, and the labels of the task if it has any.
        client: its name.
        share: whose rows of the recipe's partition these are; None for all training rows.
        observer: told of progress.
        own_validation: whether it scores on the rows that its data name for that, if clients score;
            else a share of its training rows is held out.

    Raises:
        DataError: if rows are missing, do not fit the task, or are too few to hold some out.
        RecipeError: if the partition has no such share, or the method needs all rows in one place.
        BridgeError: if the model cannot be loaded or not be aggregated exactly.
    """
    refuse_one_place(recipe)
    observer.preparing("reading the data")
    rows, separate = load_train(recipe.data, recipe.federation.seed), None
    if own_validation and recipe.evaluation.where == "clients":
        separate = load_validation(recipe.data, recipe.federation.seed)
    task = prepare_task(recipe.task, _node_splits(rows, separate))
    if share is not None:
        shares = partition_shares(recipe, task, rows)
        if share not in shares:
            raise RecipeError(
                f"the partition has no share {share!r}", [f"expected one of {', '.join(shares)}"]
            )
        rows = rows.select(shares[share])
    own = {name: table for name, table in recipe.clients.items() if name == client}
    task, tokenizer, model, specs, note = _load_model(recipe, task, own, observer)
    observer.preparing("tokenising the data")
    tokenized = {"training": task.tokenize(rows, tokenizer)}
    parted = Holdout({client: range(len(rows))}, {})
    if separate is None:
        parted, scored = part_rows(recipe, parted.train), tokenized["training"]
    else:
        tokenized["validation"] = scored = task.tokenize(separate, tokenizer)
        parted = Holdout(parted.train, {client: range(len(separate))})
    check_rows(recipe, task, model.peft_model, tokenizer, tokenized, [note], observer)
    held_out = _held_out(recipe, task, tokenizer, scored, parted)
    return _clients(recipe, task, tokenizer, model, tokenized["training"], parted, specs, held_out)


def client_rows(recipe: Recipe) -> dict[str, int]:
    """The clients of a recipe and their training rows.

    Raises:
        DataError: if data, columns or partitions are wrong.
    """
    splits = run_splits(recipe)
    task = prepare_task(recipe.task, splits)
    shares = admitted_shares(recipe, partition_shares(recipe, task, splits.train))
    return {name: len(share) for name, share in part_rows(recipe, shares).train.items()}


def admitted_shares(recipe: Recipe, shares: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The shares of the clients that ``[federation]`` admits; nobody gets those of the others.

    Raises:
        RecipeError: naming every client in ``allow`` or ``exclude`` that there is not, or if none
            is left.
    """
    table = recipe.federation
    faults = [
        f"federation.{key}: there is no client {name!r}; expected some of {', '.join(shares)}"
        for key, names in (("allow", table.allow or ()), ("exclude", table.exclude))
        for name in names
        if name not in shares
    ]
    access = AccessList(table.allow, table.exclude)
    admitted = {name: rows for name, rows in shares.items() if not access.fault(name)}
    if not admitted and not faults:
        faults.append(f"federation.exclude: it names all of {', '.join(shares)}")
    if faults:
        raise RecipeError("the recipe admits clients that there are not", faults)
    return admitted


def _with_model(prepared: Prepared, model: AdaptedModel) -> Prepared:
    """The server's side of a run in one process: the model is the clients' where these score."""
    if prepared.scoring is not None:
        return replace(prepared, model=model)
    first = replace(prepared, model=model).initial()
    return replace(prepared, origin=origin_of(model), first=first)


def _arithmetic(recipe: Recipe) -> dict[str, str]:
    trained = str(training_arithmetic(recipe.training))
    return {"training": trained, "scoring": str(scoring_arithmetic(recipe))}


def run_splits(recipe: Recipe) -> Splits:
    """The rows of a run in one process; no validation rows where nobody scores on them."""
    if recipe.evaluation.where == "server":
        return load_splits(recipe.data, recipe.federation.seed)
    rows = load_train(recipe.data, recipe.federation.seed)
    return Splits(rows, rows, fingerprint(rows), "training")


def _node_splits(rows: Dataset, separate: Dataset | None) -> Splits:
    return Splits.one("training", rows) if separate is None else Splits(rows, separate, "")


def part_rows(recipe: Recipe, shares: Mapping[str, Sequence[int]]) -> Holdout:
    """What clients train on, and what they hold out where they score; all of it as one client's."""
    parted = Holdout(shares, {})
    if recipe.evaluation.where == "clients":
        parted = hold_out(shares, recipe.evaluation.holdout, recipe.federation.seed)
    if not recipe.rule.pooled:
        return parted
    return Holdout(*(_pooled(recipe, part) for part in (parted.train, parted.held_out)))


def _pooled(recipe: Recipe, rows: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {recipe.method.name: sorted(row for share in rows.values() for row in share)}


def _held_out(
    recipe: Recipe, task: Task, tokenizer: Tokenizer, rows: Dataset, parted: Holdout
) -> HeldOut | None:
    """What clients score versions on, if they do."""
    if recipe.evaluation.where != "clients":
        return None
    table = recipe.evaluation
    scorer = RowScorer(task, tokenizer, table.batch_size, scoring_arithmetic(recipe))
    return HeldOut(scorer, rows, parted.held_out, table.every)


def _clients(
    recipe: Recipe,
    task: Task,
    tokenizer: Tokenizer,
    model: AdaptedModel,
    rows: Dataset,
    parted: Holdout,
    specs: Mapping[str, AdapterSpec],
    held_out: HeldOut | None,
) -> LocalClients:
    measure, probe, collator = None, None, task.collator(tokenizer)
    if recipe.rule.client is not None and recipe.rule.client.slots is not None:
        once = {**recipe.training, "num_train_epochs": 1, "max_steps": -1}
        probe = local_job(once, collator, recipe.federation.rounds)
    if recipe.evaluation.where != "server":
        measure = HolderMeasure(task, tokenizer, recipe.evaluation.batch_size)
    return LocalClients(
        model,
        rows,
        parted.train,
        local_job(recipe.training, collator, recipe.federation.rounds),
        recipe.federation.seed,
        specs,
        recipe.rule,
        held_out,
        measure,
        probe=probe,
    )


def partition_shares(recipe: Recipe, task: Task, rows: Dataset) -> dict[str, list[int]]:
    """The places of every client's rows, by its name."""
    column, seed = task.partition_column, recipe.federation.seed
    return split_clients(rows, recipe.partition, default_column=column, seed=seed)


def _load_model(
    recipe: Recipe, task: Task, own: Mapping[str, ClientTable], observer: Observer
) -> tuple[Task, Any, AdaptedModel, dict[str, AdapterSpec], str | None]:
    """What a base makes of a task: its labels' order, tokenizer, model, own specs, and a note."""
    check_training_device(recipe.training)
    check_reduction_device(recipe)
    seed = recipe.federation.seed
    task, tokenizer, base, new, note = load_task_base(recipe, task, observer)
    shapes = client_shapes(recipe, own, base, task.peft_task_type)
    peft_model = attach_lora(base, recipe.lora, task.peft_task_type, seed)
    if recipe.model.quantization is None:
        peft_model.to(find_device(recipe.device))
    arithmetics = training_arithmetic(recipe.training), scoring_arithmetic(recipe)
    placement = recipe.federation.placement
    model = AdaptedModel(peft_model, recipe.rule.factors, placement, arithmetics)
    specs = reshaped(model.spec, shapes)
    check_start(recipe, model, specs)
    check_new_weights(new, model.spec.dense)
    file_names(model)  # refused now, not when the adapter is written
    return task, tokenizer, model, specs, note


def check_start(recipe: Recipe, model: AdaptedModel, specs: Mapping[str, AdapterSpec]) -> None:
    """Refuse first adapters that the method cannot start from.

    Raises:
        RecipeError: naming the initialisation, and every client whose rank is too large.
    """
    name, rule, faults = recipe.method.name, recipe.rule, []
    if model.start and (rule.fresh_start or (specs and not rule.makes_up)):
        faults.append(
            f"lora.init_lora_weights: {name} has clients start from another adapter than that of "
            f"version 0, whose product must be zero; use true or 'gaussian'"
        )
    for client in specs if rule.truncates else ():
        larger = [
            f"{own.rank} in {module}, the common rank is {model.spec.modules[module].rank}"
            for module, own in specs[client].modules.items()
            if own.rank > model.spec.modules[module].rank
        ]
        if larger:
            faults.append(
                f'clients."{client}".lora: {name} hands out the first directions of the common '
                f"adapter; rank {larger[0]}; raise lora.r"
            )
    if faults:
        raise RecipeError("the method cannot start from these adapters", faults)


def reshaped(
    spec: AdapterSpec, shapes: Mapping[str, Mapping[str, tuple[int, float]]]
) -> dict[str, AdapterSpec]:
    """The adapters of clients with ranks of their own; those with equal ones share one object."""
    made: dict[tuple[tuple[str, tuple[int, float]], ...], AdapterSpec] = {}
    found = {}
    for client, shape in shapes.items():
        key = tuple(sorted(shape.items()))
        if key not in made:
            made[key] = spec.reshaped(shape)
        found[client] = made[key]
    return found


def client_shapes(
    recipe: Recipe, own: Mapping[str, ClientTable], base: PreTrainedModel, task_type: str
) -> dict[str, dict[str, tuple[int, float]]]:
    """Rank and scaling by client and module, for the clients that have their own."""
    probed: dict[str, dict[str, tuple[int, float]]] = {}
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for client, table in own.items():
        key = json.dumps(table.lora, sort_keys=True)
        if key not in probed:
            probed[key] = probe_shapes(base, {**recipe.lora, **table.lora}, task_type)
        found[client] = probed[key]
    return found
