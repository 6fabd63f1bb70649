"""From a recipe to everything that its rounds need, loaded and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers.modeling_utils import PreTrainedModel

from fedexlora.data.load import load_splits
from fedexlora.data.partition import split_clients
from fedexlora.data.task import Task, prepare_task
from fedexlora.data.tokenizer import prepare_tokenizer
from fedexlora.engine.local import training_device
from fedexlora.engine.observer import Observer
from fedexlora.engine.recipe import Recipe
from fedexlora.errors import RecipeError
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.peft_bridge.inspect import check_new_weights
from fedexlora.peft_bridge.load import attach_lora, load_base, probe_shapes, resolve_source
from fedexlora.peft_bridge.model import AdaptedModel


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that a recipe names, loaded and checked; nothing has been written yet."""

    recipe: Recipe
    task: Task
    tokenizer: Any
    model: AdaptedModel
    clients: Mapping[str, Dataset]
    """Tokenised training rows by client."""
    specs: Mapping[str, AdapterSpec]
    """The adapters of the clients that have another one than the model, by client."""
    validation: Dataset
    data_fingerprint: str

    def evaluate(self, observer: Observer) -> dict[str, float]:
        """Scores of the model as it is now."""
        return self.task.evaluate(
            self.model.peft_model,
            self.validation,
            self.tokenizer,
            self.recipe.evaluation.batch_size,
            observer.evaluating,
        )


def prepare(recipe: Recipe, observer: Observer) -> Prepared:
    """Load and check everything that a recipe names.

    Raises:
        DataError: if data, columns or partitions are wrong.
        RecipeError: if the recipe names a client that there is not.
        BridgeError: if the model cannot be loaded or not be aggregated exactly.
    """
    seed = recipe.federation.seed
    source, revision = resolve_source(recipe.model.source), recipe.model.revision
    observer.preparing("reading the data")
    splits = load_splits(recipe.data, seed)
    task = prepare_task(recipe.task, splits)
    rows = split_clients(
        splits.train, recipe.partition, default_column=task.partition_column, seed=seed
    )
    _check_clients(recipe, rows)
    observer.preparing("loading the model")
    tokenizer = prepare_tokenizer(source, revision)
    config = {**task.model_config, "pad_token_id": tokenizer.pad_token_id}
    base, new = load_base(
        source,
        revision,
        task.peft_task_type,
        config,
        seed,
        dtype=recipe.model.dtype,
        quantization=recipe.model.quantization,
        unquantised=recipe.lora.get("modules_to_save") or (),
    )
    shapes = _client_shapes(recipe, base, task.peft_task_type)
    peft_model = attach_lora(base, recipe.lora, task.peft_task_type, seed)
    if recipe.model.quantization is None:
        peft_model.to(training_device(recipe.training))
    model = AdaptedModel(peft_model, recipe.method.trained, recipe.federation.placement)
    specs = {client: model.spec.reshaped(shape) for client, shape in shapes.items()}
    check_new_weights(new, model.spec.dense)
    observer.preparing("tokenising the data")
    clients = {name: task.tokenize(part, tokenizer) for name, part in rows.items()}
    validation = task.tokenize(splits.validation, tokenizer)
    return Prepared(recipe, task, tokenizer, model, clients, specs, validation, splits.fingerprint)


def _check_clients(recipe: Recipe, rows: Mapping[str, Dataset]) -> None:
    if unknown := [client for client in recipe.clients if client not in rows]:
        raise RecipeError(
            "the recipe names clients that the data does not give",
            [f'clients."{client}": expected one of {", ".join(rows)}' for client in unknown],
        )


def _client_shapes(
    recipe: Recipe, base: PreTrainedModel, task_type: str
) -> dict[str, dict[str, tuple[int, float]]]:
    """Rank and scaling by client and module, for the clients that have their own."""
    probed: dict[str, dict[str, tuple[int, float]]] = {}
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for client, table in recipe.clients.items():
        key = json.dumps(table.lora, sort_keys=True)
        if key not in probed:
            probed[key] = probe_shapes(base, {**recipe.lora, **table.lora}, task_type)
        found[client] = probed[key]
    return found
