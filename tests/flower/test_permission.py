"""What of a server's recipe a machine runs: its own configuration decides, before any reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from fedexlora.data.config import TaskConfig
from fedexlora.data.partition_config import PartitionConfig
from fedexlora.errors import NodeError, RecipeError
from fedexlora.exchange.node_faults import NodeFault
from fedexlora.flower.node import TASK_OF_SERVER, Node, load_node, recipe_for_nodes
from fedexlora.flower.permission import (
    PARTITION_COLUMNS,
    PARTITION_OPTIONS,
    TASK_COLUMNS,
    TASK_OPTIONS,
    TASK_PROGRAMS,
    local_recipe,
)
from fedexlora.flower.recipe_options import is_plain_pattern
from fedexlora.rounds.recipe import parse_recipe

NODE = {
    "client": "north",
    "home": "/nowhere/home",
    "data": {"source": "/nowhere/data"},
    "task": {
        "kinds": ["classification", "causal-lm"],
        "columns": ["note", "code", "ward"],
        "labels": ["low", "high"],
    },
    "models": {"m": "/nowhere/model", "pinned": {"source": "hub/model", "revision": "v2"}},
    "limits": {"max_rank": 8},
}


COMPLETION = {"kind": "causal-lm", "prompt": "note", "completion": "note"}


def sent(**changes: object) -> dict:
    """A recipe that the node takes, but for the changes, by ``table__key``."""
    document: dict = {
        "model": {"source": "m"},
        "task": {"kind": "classification", "text": "note", "label": "code"}
        | {"labels": ["high", "low"]},
        "partition": {"kind": "iid", "clients": 2},
        "lora": {"r": 2, "target_modules": ["query"]},
        "training": {"learning_rate": 1e-3, "use_cpu": True},
        "method": {"name": "fedex"},
        "federation": {"seed": 1},
    }
    for key, value in changes.items():
        table, _, field = key.partition("__")
        if field:
            document.setdefault(table, {})[field] = value
        else:
            document[table] = value
    return json.loads(json.dumps(document))


def code_of(document: object, **node: object) -> NodeFault:
    with pytest.raises(NodeError) as caught:
        local_recipe(document, Node.model_validate(NODE | node))
    return NodeFault(caught.value.code)


def test_a_node_fills_in_its_own_data_and_model():
    recipe = local_recipe(sent(), Node.model_validate(NODE))
    assert recipe.data.source == "/nowhere/data"
    assert recipe.model.source == "/nowhere/model"
    assert recipe.task.labels == ("high", "low")


@pytest.mark.parametrize(
    ("tables", "known"),
    [
        (TaskConfig, TASK_COLUMNS | TASK_OPTIONS | TASK_PROGRAMS | TASK_OF_SERVER),
        (PartitionConfig, PARTITION_COLUMNS | PARTITION_OPTIONS),
    ],
    ids=["task", "partition"],
)
def test_of_every_field_it_is_known_whether_it_names_a_column(tables, known):
    """A new field that names a column must be held against the node's list."""
    fields = {field for table in get_args(get_args(tables)[0]) for field in table.model_fields}
    assert fields == known
    assert not TASK_COLUMNS & TASK_OPTIONS
    assert not TASK_OF_SERVER & (TASK_COLUMNS | TASK_OPTIONS)
    assert not PARTITION_COLUMNS & PARTITION_OPTIONS


@pytest.mark.parametrize(
    "changes",
    [
        {"task__text": "diagnosis"},
        {"task__text": ["note", "diagnosis"]},
        {"task__label": "diagnosis"},
        {"task": {"kind": "classification", "text": "note", "labels": ["low", "high"]}},
        {"task": {"kind": "regression", "text": "note", "label": "code"}},
        {"task": {"kind": "causal-lm", "text": "diagnosis"}},
        {"task": {"kind": "causal-lm", "prompt": "note", "completion": "diagnosis"}},
        {"task": {"kind": "causal-lm", "prompt": "diagnosis", "completion": "note"}},
        {"task": COMPLETION | {"prompt_template": "{prompt} {diagnosis}"}},
        {"task": COMPLETION | {"completion_template": "{completion} {diagnosis}"}},
        {"task": {"kind": "causal-lm", "prompt_template": "{diagnosis}", "completion": "note"}},
        {"task": {"kind": "chat", "messages": "diagnosis"}},
        {"partition": {"kind": "by_column", "column": "diagnosis"}},
        {"partition": {"kind": "dirichlet", "clients": 2, "alpha": 1.0, "column": "diagnosis"}},
        {"task__labels": ["low", "high", "other"]},
        {"task__labels": ["low", "other"]},
        {"task": {"kind": "classification", "text": "note", "label": "code"}},
    ],
)
def test_kinds_columns_and_labels_that_are_not_listed_are_refused(changes):
    assert code_of(sent(**changes)) is NodeFault.TASK_REFUSED


@pytest.mark.parametrize(
    ("model", "revision"),
    [
        ({"source": "m"}, None),
        ({"source": "pinned"}, "v2"),
        ({"source": "pinned", "revision": "v2"}, "v2"),
        ({"source": "m", "revision": "main"}, NodeFault.MODEL_REFUSED),
        ({"source": "pinned", "revision": "main"}, NodeFault.MODEL_REFUSED),
        ({"source": "pinned", "revision": ""}, NodeFault.MODEL_REFUSED),
        ({"source": "hub/model"}, NodeFault.MODEL_REFUSED),
        ({"source": ["m"]}, NodeFault.MODEL_REFUSED),
        ({}, NodeFault.MODEL_REFUSED),
    ],
)
def test_a_revision_is_the_nodes_to_pin(model, revision):
    document = sent(model=model)
    if isinstance(revision, NodeFault):
        assert code_of(document) is revision
    else:
        assert local_recipe(document, Node.model_validate(NODE)).model.revision == revision


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"source": "/etc"}},
        {"evaluation": {"sets": {}}},
        {"evaluation": {"mean": ["a", "b"]}},
        {"evaluation": {"where": "clients", "holdout": 0.9}},
        {"evaluation": {"where": "clients", "holdout": float("nan")}},
        {"evaluation": {"where": "elsewhere"}},
        {"training__logging_dir": "/etc"},
        {"training__optim_args": "file=/etc/passwd"},
        {"training__lr_scheduler_kwargs": {"path": "../x"}},
        {"training": [1]},
        {"lora__corda_config": {}},
        {"lora__target_modules": "(a+)+$"},
        {"lora__rank_pattern": {"(.*)*x": 2}},
        {"lora__rank_pattern": [1]},
        {"lora__modules_to_save": ["(x|x)+"]},
        {"lora__target_modules": [f"m{i}" for i in range(5000)]},
        {"lora__r": "many"},
        {"clients": {"north": {"lora": {"rank_pattern": {"(a*)*": 1}}}}},
        {"training__max_steps": None},
        {"training__num_train_epochs": float("nan")},
        {"task__labels": ["low\x1b[2J", "high"]},
        {"task__new_field": "note"},
        {"task": {"kind": "chat", "messages": "note", "chat_template": "{{ messages }}"}},
        {"task__text": "x" * 20_000},
        {"model__revision": {"a": ["b"] * 500_000}},
    ],
)
def test_what_no_server_may_set_is_refused(changes):
    assert code_of(sent(**changes)) is NodeFault.RECIPE_INVALID


@pytest.mark.parametrize("document", [None, [], "recipe", 7, {}, {"task": 1}])
def test_what_is_no_recipe_is_refused(document):
    assert code_of(document) in (NodeFault.RECIPE_INVALID, NodeFault.MODEL_REFUSED)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__r": 9},
        {"lora__rank_pattern": {"query": 9}},
        {"clients": {"north": {"lora": {"r": 9}}}},
        {"training__num_train_epochs": 11},
        {"training__max_steps": 10**6},
        {"training__per_device_train_batch_size": 1000},
        {"task__max_length": 10_000},
        {"partition__clients": 10**9},
    ],
)
def test_more_than_the_limits_is_refused(changes):
    assert code_of(sent(**changes)) is NodeFault.LIMIT_EXCEEDED


def test_what_a_recipe_says_of_other_clients_is_not_read():
    others = {"south": {"lora": {"r": 500, "rank_pattern": {"(a+)+": 1}}}}
    assert local_recipe(sent(clients=others), Node.model_validate(NODE)).clients == {}


@pytest.mark.parametrize(
    ("pattern", "plain"),
    [
        ("all-linear", True),
        ("q_proj", True),
        (r".*\.(self_attn|mlp)\..*(up|down|q)_proj", True),
        (r"(?:model\.)?layers\.[0-9]+\.q_proj", True),
        (r".*\.layers\.(1|2|3|4|5|6|7|8|9|10)\.(q|k|v)_proj", True),
        ("(a+)+$", False),
        ("(a|a)*b", False),
        ("(a|aa)+$", False),
        (r"(.*)\1", False),
        ("(?=a)a", False),
        (".*.*.*.*.*x", False),
        ("a?" * 30 + "a" * 30, False),
        ("(a|a)" * 30 + "b", False),
        ("(x{1,9}){9}", False),
        ("[", False),
        ("a" * 2000, False),
    ],
)
def test_patterns_that_may_take_long_are_none(pattern, plain):
    assert is_plain_pattern(pattern) is plain


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        ({"kinds": ["classification"], "columns": ["a"]}, "labels: needed by kind"),
        ({"kinds": ["sorcery"], "columns": ["a"]}, "expected one of classification"),
        ({"kinds": ["causal-lm"], "columns": []}, "columns"),
    ],
)
def test_a_configuration_that_leaves_something_open_is_refused(task, fault):
    with pytest.raises(ValidationError, match=fault):
        Node.model_validate(NODE | {"task": task})


def test_a_configuration_without_a_task_is_refused(tmp_path):
    file = tmp_path / "node.toml"
    file.write_text('client = "a"\nhome = "h"\nmodels = {}\n[data]\nsource = "d"\n')
    with pytest.raises(RecipeError, match=r"task: Field required"):
        load_node(file)


def own_recipe(**changes: object):
    document = {**sent(**changes), "data": {"source": "/own/data"}, "evaluation": {"batch_size": 7}}
    return parse_recipe(document, "own")


def test_where_a_node_trains_is_for_the_node_to_say():
    own = own_recipe(training={"device": "cuda:3"})
    said = recipe_for_nodes(own, own.task.model_dump(mode="json", exclude_none=True))
    assert "device" not in said["training"]
    assert code_of(sent(training__device="cuda:3")) == NodeFault.RECIPE_INVALID
    assert local_recipe(sent(), Node.model_validate(NODE)).device == "cpu", "as the server says"
    for stated, found in (
        ({"device": "cuda:1"}, "cuda:1"),
        ({"device": "cpu"}, "cpu"),
        ({"use_cpu": True}, "cpu"),
    ):
        recipe = local_recipe(sent(), Node.model_validate(NODE | stated))
        assert recipe.device == found
    for wrong in ({"device": "gpu"}, {"device": "cuda", "use_cpu": True}):
        with pytest.raises(ValidationError, match="device"):
            Node.model_validate(NODE | wrong)


@pytest.mark.parametrize("schedule", ["round", "run"])
def test_a_node_is_told_the_rounds_of_the_run_if_its_schedule_goes_over_them(schedule):
    own = own_recipe(training__schedule=schedule, federation__rounds=7)
    said = recipe_for_nodes(own, own.task.model_dump(mode="json", exclude_none=True))
    assert said["federation"].get("rounds") == (7 if schedule == "run" else None)
    recipe = local_recipe(json.loads(json.dumps(said)), Node.model_validate(NODE))
    assert recipe.training["schedule"] == schedule
    assert schedule == "round" or recipe.federation.rounds == 7


def test_a_simulated_client_runs_this_machines_recipe_and_no_other():
    own = own_recipe()
    said = recipe_for_nodes(own, own.task.model_dump(mode="json", exclude_none=True))
    assert local_recipe(said, own) == own
    for other in (
        {**said, "data": {"source": "/etc"}},
        {**said, "model": {"source": "/etc"}},
        {**said, "task": {**said["task"], "text": "diagnosis"}},
        {},
        None,
    ):
        with pytest.raises(NodeError) as caught:
            local_recipe(other, own)
        assert caught.value.code == NodeFault.RECIPE_INVALID


def test_a_simulated_client_takes_the_labels_that_the_server_read():
    own = own_recipe(task={"kind": "classification", "text": "note", "label": "code"})
    said = recipe_for_nodes(own, {**own.task.model_dump(exclude_none=True), "labels": ["b", "a"]})
    recipe = local_recipe(json.loads(json.dumps(said)), own)
    assert recipe.task.labels == ("b", "a")
    assert recipe.data == own.data


def test_only_one_file_of_the_nodes_makes_a_recipe_of_a_message():
    """Every path to a client goes through ``local_recipe``."""
    flower = Path(__file__).parents[2] / "src" / "fedexlora" / "flower"
    makers = {
        file.name
        for file in flower.glob("*.py")
        if any(word in file.read_text() for word in ("parse_recipe", "Recipe.model_validate"))
    }
    assert makers == {"permission.py"}
