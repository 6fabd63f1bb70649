"""What a recipe of a server may ask of this machine: the one way by which it comes to be run here.

All of it is decided before a row or a model is read. A node's ``node.toml`` says what is allowed; a
simulated client runs the recipe of its own machine, and no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedexlora.errors import NodeError, RecipeError
from fedexlora.exchange.node_faults import NodeFault
from fedexlora.exchange.untrusted import short
from fedexlora.flower.node import EVALUATION, Node, recipe_for_nodes
from fedexlora.flower.recipe_options import TABLES, option_faults, text_faults

if TYPE_CHECKING:
    from fedexlora.rounds.recipe import Recipe

TASK_COLUMNS = frozenset({"text", "label", "prompt", "completion", "messages"})
"""Fields of a task that name columns."""
TASK_TEMPLATES = frozenset({"prompt_template", "completion_template"})
"""Fields of a task in whose texts columns are named."""
TASK_OPTIONS = TASK_TEMPLATES | {"kind", "labels", "metrics", "max_length"}
"""All other fields of a task that a server may set."""
TASK_PROGRAMS = frozenset({"chat_template"})
"""Fields of a task that are programs: a node runs its own tokenizer's, and none of a server's."""
PARTITION_COLUMNS = frozenset({"column"})
"""Fields of a partition that name columns."""
PARTITION_OPTIONS = frozenset({"kind", "clients", "alpha", "min_rows"})
"""All other fields of a partition that a server may set."""
_MOST_BYTES = 2**20
"""Of a recipe as JSON."""
_MOST_CLIENTS = 100_000
"""Of a partition: the node makes a list of them."""


def local_recipe(sent: object, own: Node | Recipe) -> Recipe:
    """The recipe that this machine runs, of the one that a server sent.

    Args:
        sent: from the server; anything that JSON holds.
        own: the node's configuration, or the recipe of a simulation on this machine.

    Raises:
        NodeError: with everything that is not allowed, or that is wrong.
    """
    try:
        return _of_node(sent, own) if isinstance(own, Node) else _of_simulation(sent, own)
    except RecursionError as error:
        raise NodeError(NodeFault.RECIPE_INVALID, "the recipe is nested too deeply") from error


def _of_simulation(sent: object, own: Recipe) -> Recipe:
    """The machine's own recipe, where the server's is the same."""
    from fedexlora.rounds.recipe import Recipe

    task = own.task.model_dump(mode="json", exclude_none=True)
    theirs = sent.get("task") if isinstance(sent, dict) else None
    if isinstance(theirs, dict) and "labels" in theirs:
        task.setdefault("labels", theirs["labels"])  # the server has read them from the same rows
    if sent != recipe_for_nodes(own, task):
        raise NodeError(
            NodeFault.RECIPE_INVALID,
            "the server's recipe is not the one that this machine simulates",
        )
    document = own.model_dump(mode="json", exclude_none=True)
    return Recipe.model_validate({**document, "task": task})


def _of_node(sent: object, node: Node) -> Recipe:
    # Every message starts a process that imports this module; it must not load PyTorch.
    from fedexlora.rounds.recipe import parse_recipe

    document = _document(sent, node)
    model = _model(document["model"], node)
    data = node.data.model_dump(exclude={"share"}, exclude_none=True)
    training = _on_own_device(document["training"], node)
    try:
        recipe = parse_recipe(
            {**document, "model": model, "data": data, "training": training}, "of the server"
        )
        limit_faults = list(_limit_faults(recipe, node))
    except RecipeError as error:
        raise NodeError(NodeFault.RECIPE_INVALID, error.summary, error.faults) from error
    except Exception as error:  # a library's check of a value that is no value of its field
        raise NodeError(NodeFault.RECIPE_INVALID, f"{type(error).__name__}: {error}") from error
    _refuse(NodeFault.TASK_REFUSED, _task_faults(recipe, node))
    _refuse(NodeFault.LIMIT_EXCEEDED, limit_faults)
    return recipe


def _on_own_device(asked: Mapping[str, Any], node: Node) -> dict[str, Any]:
    """The table of training, with the node's own device if it states one."""
    if node.use_cpu or node.device != "auto":
        return {**asked, "use_cpu": False, "device": "cpu" if node.use_cpu else node.device}
    return dict(asked)


def _refuse(code: NodeFault, faults: list[str]) -> None:
    if faults:
        raise NodeError(code, f"the recipe is refused: {len(faults)} fault(s)", faults)


def _document(sent: object, node: Node) -> dict[str, Any]:
    """The tables of the recipe, with those options only that a server may set."""
    if not isinstance(sent, dict):
        raise NodeError(NodeFault.RECIPE_INVALID, f"expected a recipe, found {short(sent)}")
    if len(json.dumps(sent)) > _MOST_BYTES:
        raise NodeError(NodeFault.RECIPE_INVALID, f"the recipe has over {_MOST_BYTES} bytes")
    faults = [f"{key}: a server may not set it" for key in sent if key not in TABLES]
    faults += [
        f"{table}: expected a table, found {short(sent.get(table, {}))}"
        for table in sorted(TABLES)
        if not isinstance(sent.get(table, {}), dict)
    ]
    _refuse(NodeFault.RECIPE_INVALID, faults)
    document = {table: sent.get(table, {}) for table in sorted(TABLES)}
    own = document["clients"].get(node.client)
    document["clients"] = {} if own is None else {node.client: own}
    faults = list(text_faults(document))
    faults += option_faults(document)
    known = {
        "evaluation": frozenset(EVALUATION),
        "task": TASK_COLUMNS | TASK_OPTIONS,
        "partition": PARTITION_COLUMNS | PARTITION_OPTIONS,
    }
    faults += [
        f"{table}.{key}: a server may not set it"
        for table, fields in known.items()
        for key in document[table]
        if key not in fields
    ]
    _refuse(NodeFault.RECIPE_INVALID, faults)
    return document


def _model(asked: Mapping[str, Any], node: Node) -> dict[str, Any]:
    """The table of the model, with the node's own source and revision."""
    source, revision = asked.get("source"), asked.get("revision")
    listed = node.models.get(source) if isinstance(source, str) else None
    if listed is None:
        known = ", ".join(map(repr, node.models)) or "none"
        fault = f"model.source: {short(source)} is not one of this node's models ({known})"
        raise NodeError(NodeFault.MODEL_REFUSED, fault)
    if revision not in (None, listed.revision):
        pinned = f"this node pins {listed.revision!r}" if listed.revision else "this node pins none"
        fault = f"model.revision: {short(revision)} is not this node's: {pinned}"
        raise NodeError(NodeFault.MODEL_REFUSED, fault)
    return {**asked, "source": listed.source, "revision": listed.revision}


def _task_faults(recipe: Recipe, node: Node) -> list[str]:
    """Kind, columns and labels that ``[task]`` does not allow."""
    allowed, faults = node.task, []
    if recipe.task.kind not in allowed.kinds:
        faults.append(f"task.kind: {recipe.task.kind!r} is not one of {', '.join(allowed.kinds)}")
    faults += [
        f"{key}: {short(column)} is not one of this node's columns"
        for key, column in _columns(recipe)
        if column not in allowed.columns
    ]
    if recipe.task.kind == "classification":
        asked = sorted(map(str, recipe.task.labels or ()))
        if asked != sorted(map(str, allowed.labels or ())):
            faults.append("task.labels: expected all of this node's labels, and no other")
    return faults


def _columns(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every column that the recipe names, with its key; defaults too."""
    for table, fields in (("task", TASK_COLUMNS), ("partition", PARTITION_COLUMNS)):
        for field in sorted(fields):
            named = getattr(getattr(recipe, table), field, None)
            for column in (named,) if isinstance(named, str) else named or ():
                yield f"{table}.{field}", column
    for column in getattr(recipe.task, "template_columns", ()):
        yield f"task.{' or task.'.join(sorted(TASK_TEMPLATES))}", column


def _limit_faults(recipe: Recipe, node: Node) -> Iterator[str]:
    """Numbers above ``[limits]``."""
    limits, training = node.limits, recipe.training
    own = recipe.clients.get(node.client)
    lora = {**recipe.lora, **(own.lora if own else {})}
    asked = [
        *(("lora.r", rank, limits.max_rank) for rank in _ranks(lora)),
        ("training.num_train_epochs", training.get("num_train_epochs", 1), limits.max_epochs),
        ("training.max_steps", training.get("max_steps", -1), limits.max_steps),
        ("partition.clients", getattr(recipe.partition, "clients", 1), _MOST_CLIENTS),
        ("task.max_length", recipe.task.max_length, limits.max_length),
        (
            "training.per_device_train_batch_size",
            training.get("per_device_train_batch_size", 8),
            limits.max_batch,
        ),
    ]
    if recipe.evaluation.where == "clients":
        asked.append(("evaluation.batch_size", recipe.evaluation.batch_size, limits.max_batch))
    for key, value, most in asked:
        if not value <= most:  # of NaN, `>` would say that it is not more
            yield f"{key}: {value} is more than this node allows ({most})"


def _ranks(lora: Mapping[str, Any]) -> list[Any]:
    return [lora.get("r", 8), *(lora.get("rank_pattern") or {}).values()]
