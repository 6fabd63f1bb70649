"""The server's side of a run without a model: what nodes agree on takes the model's place."""

from __future__ import annotations

from fedexlora.errors import BridgeError, RecipeError, RunError
from fedexlora.flower.transport import FlowerTransport
from fedexlora.peft_bridge.names import INITIALISED_FROM_DATA, MUTATING
from fedexlora.peft_bridge.origin import decode_origin
from fedexlora.peft_bridge.source import locate
from fedexlora.rounds.prepared import Prepared, check_reduction_device
from fedexlora.rounds.recipe import Recipe


def check_coordinator(recipe: Recipe) -> None:
    """Refuse what needs a model at the server.

    Raises:
        RecipeError: naming every key, and the way out.
    """
    faults = []
    initial = recipe.lora.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith((*MUTATING, *INITIALISED_FROM_DATA)):
        faults.append(f"lora.init_lora_weights: {initial!r} makes version 0 of the base's weights")
    if recipe.rule.draws:
        key = "next_adapter" if "next_adapter" in recipe.method.options else "name"
        chosen = recipe.method.options.get(key, recipe.method.name)
        faults.append(f"method.{key}: {chosen!r} may draw new factors for the model's layers")
    faults += [
        f'clients."{name}".lora: a rank of its own is that of the model\'s layers'
        for name in recipe.clients
    ]
    if faults:
        faults.append("leave these out, or have the server score: evaluation.where = 'server'")
    if recipe.task.kind == "classification" and recipe.task.labels is None:
        faults.append("task.labels: needed, as the server reads no rows that have them")
    if faults:
        where = recipe.evaluation.where
        said = f"the server has no model, as evaluation.where is {where!r}"
        raise RecipeError(said, faults)
    check_reduction_device(recipe)


def begun(recipe: Recipe, transport: FlowerTransport, wait: float) -> Prepared:
    """The run's beginning, from one of the nodes that have agreed on it.

    Args:
        recipe: what to run.
        transport: has gathered the nodes.
        wait: for how many seconds a node is waited for.

    Raises:
        RunError: if no node sends what it has stated, naming what each sent.
    """
    faults = []
    for client in transport.agreement.senders():
        stated = transport.agreement.stated[client]
        try:
            message = transport.fetch_origin(client, stated.size, wait)
            trained, base = recipe.rule.factors, _base_name(recipe.model.source)
            return Prepared(recipe, origin=decode_origin(message, stated, trained, base))
        except ValueError as error:
            faults.append(f"{client}: {error}")
    raise RunError("no node has sent version 0", faults)


def _base_name(source: str) -> str:
    """What PEFT notes as an adapter's base: where the source lies, if it is on this machine."""
    try:
        return locate(source)
    except BridgeError:
        return source
