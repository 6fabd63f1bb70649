"""From a recipe to everything that its rounds need, loaded and checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from fedexlora.data.load import Splits, fingerprint, load_splits, load_train, load_validation
from fedexlora.data.partition import client_values, split_clients
from fedexlora.data.task import Task, prepare_task
from fedexlora.errors import RecipeError
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.local.arguments import check_training_device, training_arithmetic
from fedexlora.local.clients import LocalClients
from fedexlora.local.job import LocalJob
from fedexlora.local.jobs import local_job
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.device import find_device
from fedexlora.peft_bridge.export import file_names
from fedexlora.peft_bridge.inspect import check_new_weights
from fedexlora.peft_bridge.load import attach_lora, probe_shapes
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.participation import AccessList
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.recipe_tables import ClientTable
from fedexlora.rounds.rows import RowSummary, check_rows
from fedexlora.rounds.scoring import Scoring, load_sets, prepare_scoring, scoring_arithmetic
from fedexlora.rounds.task_base import load_task_base

_ROWS_READ = 8
"""Validation rows over which is measured what comes out of the layers."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the server's side of a recipe names, loaded and checked; nothing is written yet."""

    recipe: Recipe
    scoring: Scoring
    model: AdaptedModel
    specs: Mapping[str, AdapterSpec]
    """The adapters of the clients that have another one than the model, by client."""
    data_fingerprint: str
    summary: RowSummary

    @property
    def task(self) -> Task:
        """With what it learned from the rows and the model."""
        return self.scoring.task

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 - transformers is untyped here
        """The model's."""
        return self.scoring.tokenizer

    @property
    def validation(self) -> Dataset:
        """Tokenised."""
        return self.scoring.validation

    def evaluate(self, observer: Observer) -> dict[str, float]:
        """Scores of the model as it is now."""
        return self.scoring.scores(self.model.peft_model, observer)

    @property
    def forwards(self) -> dict[Arithmetic, Callable[[], None]]:
        """By arithmetic in which the model is used: it reads some validation rows."""
        read, model = self.scoring.read_rows, self.model.peft_model
        return {how: partial(read, model, how, _ROWS_READ) for how in self.model.arithmetics}


def prepare(recipe: Recipe, observer: Observer) -> tuple[Prepared, LocalClients]:
    """Load and check everything that a recipe names: the server's side, and all clients.

    Raises:
        DataError: if data, columns or partitions are wrong.
        RecipeError: if the recipe names a client that there is not, or trains in an arithmetic that
            this machine has not.
        BridgeError: if the model cannot be loaded or not be aggregated exactly.
    """
    seed = recipe.federation.seed
    observer.preparing("reading the data")
    sets = load_sets(recipe)
    splits = load_splits(recipe.data, seed)
    task = prepare_task(recipe.task, splits)
    every = _shares(recipe, task, splits.train)
    check_clients(recipe, list(every))
    shares = _admitted(recipe, every)
    values = client_values(splits.train, recipe.partition, shares)
    if recipe.rule.pooled:
        shares, values = _pooled(recipe, shares), {}
    task, tokenizer, model, specs, note = _load_model(recipe, task, recipe.clients, observer)
    observer.preparing("tokenising the data")
    rows = task.tokenize(splits.train, tokenizer)  # once: of many clients, each has few
    scoring = prepare_scoring(recipe, task, tokenizer, model.peft_model, splits.validation, sets)
    tokenized = {"training": rows, "validation": scoring.validation}
    summary = check_rows(
        recipe, task, model.peft_model, tokenizer, tokenized, [note, *scoring.notes], observer
    )
    summary = replace(summary, client_values=values)
    # Every row that a number of the run comes from is part of its data.
    others = [own.rows for own in sets.values()]
    data = fingerprint(splits.train, splits.validation, *others) if others else splits.fingerprint
    prepared = Prepared(recipe, scoring, model, specs, data, summary)
    jobs = _jobs(recipe, task, tokenizer)
    return prepared, _clients(recipe, model, rows, shares, specs, jobs)


def prepare_server(recipe: Recipe, observer: Observer) -> Prepared:
    """Load and check the server's side alone: the model and the validation rows.

    Raises:
        DataError: if the validation rows are missing or do not fit the task.
        RecipeError: if this machine has not the arithmetic in which clients train, or the method
            needs all rows in one place.
        BridgeError: if the model cannot be loaded or not be aggregated exactly.
    """
    if recipe.rule.pooled:
        raise RecipeError(
            f"method.name: {recipe.method.name} trains on the rows of all clients in one place",
            ["nodes keep theirs: run it with fedexlora run, where the data are"],
        )
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
    return Prepared(recipe, scoring, model, specs, data, summary)


def prepare_client(
    recipe: Recipe, client: str, share: str | None, observer: Observer
) -> LocalClients:
    """Load and check one client's side: the model and its own training rows.

    Args:
        recipe: with the client's own data, and the labels of the task if it has any.
        client: its name.
        share: whose rows of the recipe's partition these are; None for all training rows.
        observer: told of progress.

    Raises:
        DataError: if the training rows are missing or do not fit the task.
        RecipeError: if the partition has no such share.
        BridgeError: if the model cannot be loaded or not be aggregated exactly.
    """
    seed = recipe.federation.seed
    observer.preparing("reading the data")
    rows = load_train(recipe.data, seed)
    task = prepare_task(recipe.task, Splits.one("training", rows))
    if share is not None:
        shares = _shares(recipe, task, rows)
        if share not in shares:
            raise RecipeError(
                f"the partition has no share {share!r}", [f"expected one of {', '.join(shares)}"]
            )
        rows = rows.select(shares[share])
    own = {name: table for name, table in recipe.clients.items() if name == client}
    task, tokenizer, model, specs, note = _load_model(recipe, task, own, observer)
    observer.preparing("tokenising the data")
    rows = task.tokenize(rows, tokenizer)
    tokenized = {"training": rows}
    check_rows(recipe, task, model.peft_model, tokenizer, tokenized, [note], observer)
    everything = {client: range(len(rows))}
    return _clients(recipe, model, rows, everything, specs, _jobs(recipe, task, tokenizer))


def _clients(
    recipe: Recipe,
    model: AdaptedModel,
    rows: Dataset,
    shares: Mapping[str, Sequence[int]],
    specs: Mapping[str, AdapterSpec],
    jobs: tuple[LocalJob, LocalJob],
) -> LocalClients:
    job, probe = jobs
    return LocalClients(model, rows, shares, job, recipe.federation.seed, specs, recipe.rule, probe)


def _jobs(
    recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase
) -> tuple[LocalJob, LocalJob]:
    """What trains a client, and what trains it for one epoch."""
    collator, rounds = task.collator(tokenizer), recipe.federation.rounds
    once = {**recipe.training, "num_train_epochs": 1, "max_steps": -1}
    return local_job(recipe.training, collator, rounds), local_job(once, collator, rounds)


def client_rows(recipe: Recipe) -> dict[str, int]:
    """The clients of a recipe and their training rows.

    Raises:
        DataError: if data, columns or partitions are wrong.
    """
    splits = load_splits(recipe.data, recipe.federation.seed)
    task = prepare_task(recipe.task, splits)
    shares = _admitted(recipe, _shares(recipe, task, splits.train))
    if recipe.rule.pooled:
        shares = _pooled(recipe, shares)
    return {name: len(share) for name, share in shares.items()}


def check_clients(recipe: Recipe, clients: Sequence[str]) -> None:
    """Refuse a recipe that says something of a client that there is not.

    Raises:
        RecipeError: naming every such client.
    """
    if unknown := [client for client in recipe.clients if client not in clients]:
        raise RecipeError(
            "the recipe names clients that there are not",
            [f'clients."{client}": expected one of {", ".join(clients)}' for client in unknown],
        )


def _admitted(recipe: Recipe, shares: Mapping[str, list[int]]) -> dict[str, list[int]]:
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


def _pooled(recipe: Recipe, shares: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The rows of all clients, as those of one."""
    return {recipe.method.name: sorted(row for share in shares.values() for row in share)}


def _shares(recipe: Recipe, task: Task, rows: Dataset) -> dict[str, list[int]]:
    column, seed = task.partition_column, recipe.federation.seed
    return split_clients(rows, recipe.partition, default_column=column, seed=seed)


def _check_reduction_device(recipe: Recipe) -> None:
    """Refuse a device that this machine has not.

    Raises:
        RecipeError: if it has not.
    """
    found, wanted = torch.cuda.device_count(), torch.device(recipe.federation.reduce_on)
    if wanted.type == "cuda" and (wanted.index or 0) >= found:
        raise RecipeError(
            "this machine cannot reduce updates there",
            [f"federation.reduce_on: {wanted} is asked for, there are {found} CUDA device(s)"],
        )


def _load_model(
    recipe: Recipe, task: Task, own: Mapping[str, ClientTable], observer: Observer
) -> tuple[Task, Any, AdaptedModel, dict[str, AdapterSpec], str | None]:
    """What a base makes of a task: its labels' order, tokenizer, model, own specs, and a note."""
    check_training_device(recipe.training)
    _check_reduction_device(recipe)
    seed = recipe.federation.seed
    task, tokenizer, base, new, note = load_task_base(recipe, task, observer)
    shapes = _client_shapes(recipe, own, base, task.peft_task_type)
    peft_model = attach_lora(base, recipe.lora, task.peft_task_type, seed)
    if recipe.model.quantization is None:
        peft_model.to(find_device(recipe.device))
    arithmetics = training_arithmetic(recipe.training), scoring_arithmetic(recipe)
    placement = recipe.federation.placement
    model = AdaptedModel(peft_model, recipe.rule.factors, placement, arithmetics)
    specs = _reshaped(model.spec, shapes)
    check_new_weights(new, model.spec.dense)
    file_names(model)  # refused now, not when the adapter is written
    return task, tokenizer, model, specs, note


def _reshaped(
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


def _client_shapes(
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
