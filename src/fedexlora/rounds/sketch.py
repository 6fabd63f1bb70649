"""A run as far as it is known before it: rows, clients and a model without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from fedexlora.data.batches import Collator
from fedexlora.data.task import prepare_task
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.local.arguments import check_training_device, training_arithmetic
from fedexlora.peft_bridge.export import file_names
from fedexlora.peft_bridge.load import attach_lora
from fedexlora.peft_bridge.outline import ModelOutline
from fedexlora.rounds.loop import check_enough_clients
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import (
    admitted_shares,
    client_shapes,
    part_rows,
    partition_shares,
    reshaped,
    run_splits,
)
from fedexlora.rounds.prepared import check_clients, check_reduction_device
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.rows import RowSummary, check_rows
from fedexlora.rounds.scoring import Scoring, load_sets, prepare_scoring, scoring_arithmetic
from fedexlora.rounds.task_base import load_task_base


@dataclass(frozen=True, slots=True)
class Sketch:
    """What a recipe names, checked, but for the numbers of the model."""

    recipe: Recipe
    model: ModelOutline
    """On torch's meta device."""
    specs: Mapping[str, AdapterSpec]
    """The adapters of the clients that have another one than the model, by client."""
    rows: Dataset
    """The tokenised training rows of all clients."""
    num_examples: Mapping[str, int]
    """Training rows by client."""
    collator: Collator
    scoring: Scoring | None
    """None where the server does not score."""
    summary: RowSummary


def sketch(recipe: Recipe, observer: Observer) -> Sketch:
    """Read and check everything that a recipe names, but for weights.

    Args:
        recipe: the recipe.
        observer: told of progress.

    Raises:
        InputError: as :func:`fedexlora.rounds.preparation.prepare` does, but for what only weights
            can say: parameters that the model's files lack.
    """
    observer.preparing("reading the data")
    sets = load_sets(recipe)
    splits = run_splits(recipe)
    task = prepare_task(recipe.task, splits)
    every = partition_shares(recipe, task, splits.train)
    check_clients(recipe, list(every))
    parted = part_rows(recipe, admitted_shares(recipe, every))
    task, tokenizer, model, specs, note = _outlined(recipe, task, observer)
    observer.preparing("tokenising the data")
    rows = task.tokenize(splits.train, tokenizer)
    scoring, tokenized, notes = None, {"training": rows}, [note]
    if recipe.evaluation.where == "server":
        validation = splits.validation
        scoring = prepare_scoring(recipe, task, tokenizer, model.peft_model, validation, sets)
        tokenized |= {"validation": scoring.validation}
        notes += scoring.notes
    summary = check_rows(recipe, task, model.peft_model, tokenizer, tokenized, notes, observer)
    num_examples = {client: len(share) for client, share in parted.train.items()}
    check_enough_clients(recipe, num_examples)
    collator = task.collator(tokenizer)
    return Sketch(recipe, model, specs, rows, num_examples, collator, scoring, summary)


def _outlined(
    recipe: Recipe,
    task: Any,  # noqa: ANN401 - each kind of task has its own type
    observer: Observer,
) -> tuple[Any, Any, ModelOutline, dict[str, AdapterSpec], str | None]:
    """The task, its tokenizer, the model, own specs, and a note."""
    check_training_device(recipe.training)
    check_reduction_device(recipe)
    task, tokenizer, base, _, note = load_task_base(recipe, task, observer, weights=False)
    shapes = client_shapes(recipe, recipe.clients, base, task.peft_task_type)
    # Initialisations that look at the weights have none to look at; shapes are the same.
    plain = {**recipe.lora, "init_lora_weights": True}
    peft_model = attach_lora(base, plain, task.peft_task_type, recipe.federation.seed)
    given = recipe.lora.get("init_lora_weights", True)
    peft_model.peft_config["default"].init_lora_weights = given
    arithmetics = training_arithmetic(recipe.training), scoring_arithmetic(recipe)
    placement = recipe.federation.placement
    model = ModelOutline(peft_model, recipe.rule.factors, placement, arithmetics)
    file_names(model)
    return task, tokenizer, model, reshaped(model.spec, shapes), note
