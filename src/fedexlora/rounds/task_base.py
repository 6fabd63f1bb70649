"""A recipe's base with a head for its task, as it is before anything is adapted."""

from __future__ import annotations

from typing import Any

from transformers.modeling_utils import PreTrainedModel

from fedexlora.data.capacity import check_config, load_config
from fedexlora.data.head import head_labels, head_note, in_head_order
from fedexlora.data.task import Task
from fedexlora.data.tokenizer import prepare_tokenizer
from fedexlora.peft_bridge.device import find_device
from fedexlora.peft_bridge.load import load_base
from fedexlora.peft_bridge.source import resolve_source
from fedexlora.peft_bridge.weightless import weightless_base
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.recipe import Recipe


def load_task_base(
    recipe: Recipe, task: Task, observer: Observer, *, weights: bool = True
) -> tuple[Task, Any, PreTrainedModel, frozenset[str], str | None]:
    """A recipe's untouched base with a head for its task, on the processor unless it is quantised.

    Args:
        recipe: the recipe.
        task: its task, as far as it is known from rows.
        observer: told of progress.
        weights: load them; else the base is on torch's meta device, and what its files lack is not
            known.

    Returns:
        The task with its labels in the order of the base's head, the tokenizer, the base, the
        names of its parameters that its files lack, and a note.

    Raises:
        DataError: if the task does not fit the base.
        BridgeError: if it cannot be loaded.
    """
    observer.preparing("loading the model")
    source, revision = resolve_source(recipe.model.source), recipe.model.revision
    own_config, tokenizer = load_config(source, revision), prepare_tokenizer(source, revision)
    check_config(recipe.task, task.model_config.get("num_labels"), own_config, tokenizer)
    head = head_labels(own_config)
    stated, task = task, in_head_order(task, head)
    config = {**task.model_config, "pad_token_id": tokenizer.pad_token_id}
    table, whole = recipe.model, recipe.lora.get("modules_to_save") or ()
    if weights:
        base, new = load_base(
            source,
            revision,
            task.peft_task_type,
            config,
            recipe.federation.seed,
            dtype=table.dtype,
            quantization=table.quantization,
            unquantised=whole,
            device=find_device(recipe.device),
        )
    else:
        base = weightless_base(
            source,
            revision,
            task.peft_task_type,
            config,
            dtype=table.dtype,
            quantization=table.quantization,
            unquantised=whole,
        )
        new = frozenset()
    inside = f"{base.base_model_prefix}."
    note = head_note(stated, task, head, trained=all(x.startswith(inside) for x in new))
    return task, tokenizer, base, new, note
