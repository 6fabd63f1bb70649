"""A recipe: everything that defines a run, as data."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import tomlkit
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from fedexlora.data.config import DataConfig, TaskConfig
from fedexlora.data.partition_config import PartitionConfig
from fedexlora.errors import RecipeError, of_training
from fedexlora.local.own_keys import stated_device, with_own_keys
from fedexlora.methods import METHODS, Rule
from fedexlora.peft_bridge.arithmetic import Width
from fedexlora.rounds.participation import AccessList, Participation
from fedexlora.rounds.recipe_faults import method_faults, table_faults
from fedexlora.rounds.recipe_file import read_document
from fedexlora.rounds.recipe_tables import (
    NAMED,
    ClientTable,
    EvaluationTable,
    FederationTable,
    MethodTable,
    ModelTable,
    Table,
    TrackingTable,
)
from fedexlora.rounds.screening import Screening
from fedexlora.rounds.set_mean import MEAN, mean_faults


class Recipe(Table):
    """Everything that defines a run."""

    model: ModelTable
    task: TaskConfig
    data: DataConfig
    partition: PartitionConfig
    lora: dict[str, Any]
    """Fields of PEFT's ``LoraConfig``."""
    training: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """Fields of transformers' ``TrainingArguments`` for the local training of one round, and
    ``schedule`` and ``device``."""
    method: MethodTable = MethodTable()
    federation: FederationTable = FederationTable()
    evaluation: EvaluationTable = EvaluationTable()
    tracking: TrackingTable = TrackingTable()
    clients: dict[str, ClientTable] = Field(default_factory=dict)
    """By client: what it has otherwise than the others."""

    @field_validator("training")
    @classmethod
    def _own_keys_have_values(cls, training: dict[str, Any]) -> dict[str, Any]:
        return with_own_keys(training)

    @model_validator(mode="after")
    def _scoring_has_a_dtype(self) -> Self:
        """What is not said is what the model's weights are: a resolved recipe states it."""
        if self.evaluation.dtype is None:
            scoring = self.evaluation.model_copy(update={"dtype": self.model.dtype})
            object.__setattr__(self, "evaluation", scoring)
        return self

    @model_validator(mode="after")
    def _method_is_resolved(self) -> Self:
        """Options that are not given are stated with their defaults."""
        if faults := method_faults(self.method.model_dump()):
            raise ValueError("; ".join(faults))
        options = METHODS[self.method.name].options.model_validate(self.method.options)
        stated = MethodTable(name=self.method.name, **options.model_dump())
        object.__setattr__(self, "method", stated)
        return self

    @property
    def device(self) -> str:
        """The name of the device that the model is on, trained and scored."""
        return stated_device(self.training)

    @property
    def scoring_dtype(self) -> Width:
        """In which products are computed when the model is scored."""
        return self.evaluation.dtype or self.model.dtype

    @property
    def headline(self) -> str:
        """The score that runs are compared by."""
        return self.task.headline if self.evaluation.mean is None else MEAN

    @property
    def client_metrics(self) -> tuple[str, ...]:
        """What clients score versions by; nothing where they do not."""
        if self.evaluation.where != "clients":
            return ()
        return tuple(dict.fromkeys(("loss", *self.task.metrics)))

    def metrics_of(self, version: int) -> tuple[str, ...]:
        """What clients score a version by that they train from."""
        return self.client_metrics if version % self.evaluation.every == 0 else ()

    def scored(self, round_: int) -> bool:
        """Whether a round ends with scores of the server's."""
        if self.evaluation.where != "server":
            return False
        return round_ % self.evaluation.every == 0 or round_ == self.federation.rounds

    def of_set(self, name: str) -> Recipe:
        """The recipe of one of ``[evaluation.sets]``, whose validation rows are that set.

        Raises:
            ValidationError: if its values are wrong.
        """
        table = self.evaluation.sets[name]
        document = self.model_dump(mode="json", exclude_none=True)
        data, task = document["data"], document["task"]
        if "source" in table.data:  # another data set has its own configurations and revisions
            data = {k: v for k, v in data.items() if k not in ("config", "revision")}
        document["data"] = {**data, **table.data}
        document["task"] = {**task, **table.task}
        generation = table.task.get("generation")
        if isinstance(generation, dict):
            document["task"]["generation"] = {**task.get("generation", {}), **generation}
        document["evaluation"]["sets"] = {}
        document["evaluation"].pop("mean", None)
        return Recipe.model_validate(document)

    @property
    def rule(self) -> Rule:
        """What clients and server do by the method and its options."""
        return METHODS[self.method.name].rule_of(self.method.options)

    @property
    def participation(self) -> Participation:
        """Who takes part in a round, and how much each one counts."""
        table = self.federation
        if self.rule.pooled:
            return Participation()
        return Participation(
            table.clients_per_round,
            table.fraction,
            table.min_updates,
            table.deadline,
            table.weighting,
            table.weight_cap,
            table.stale,
        )

    @property
    def access(self) -> AccessList:
        """Which clients may take part at all; of one client that has the rows of those, all."""
        if self.rule.pooled:
            return AccessList()
        return AccessList(self.federation.allow, self.federation.exclude)

    @property
    def screening(self) -> Screening | None:
        """The rule against bad updates, if there is one."""
        table = self.federation
        if table.robust is None:
            return None
        return Screening(table.robust, table.clip_norm, table.bad_share)

    def to_toml(self) -> str:
        """The resolved recipe: every value, defaults included."""
        return tomlkit.dumps(self.model_dump(mode="json", exclude_none=True))

    def differences(self, other: Recipe) -> list[str]:
        """Every key in which ``other`` differs, as ``key: mine, not theirs``."""
        mine, theirs = dict(_flat(self.model_dump())), dict(_flat(other.model_dump()))
        return [
            f"{key}: {mine.get(key)!r} there, {theirs.get(key)!r} here"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]


_NO_MODEL_HERE = (
    "evaluation.where: 'server' needs the model here, and with it transformers and PEFT: "
    "pip install 'fedexlora[train]', or have nodes score, evaluation.where = 'clients'"
)


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), model: Mapping[str, Any] | None = None
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a TOML file; ``task.chat_template`` may name a file, whose text takes its place.
        overrides: ``table.key=value``, the value in TOML or else taken as text.
        model: values of the model's table that go before those of the file, not of the overrides.

    Raises:
        RecipeError: if a file cannot be read or parsed; with all unknown keys (and the nearest
            valid ones), missing keys and invalid values at once.
    """
    over = {"model": model} if model else {}
    return parse_recipe(read_document(Path(path), overrides, over), str(path))


def parse_recipe(document: Mapping[str, Any], name: str) -> Recipe:
    """Check a recipe's content; ``name`` stands in messages.

    Raises:
        RecipeError: with every fault.
    """
    faults: list[str] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        # Faults between tables have no place; those of the method are said below, one by one.
        found = [e for e in error.errors() if e["loc"]]
        faults += [_describe(e["type"], e["loc"], e["msg"], e["input"]) for e in found]
    checks = _library_checks()
    for table, check in checks.items():
        if isinstance(document.get(table), dict):
            faults += check(document[table], table)
    faults += method_faults(document.get("method", {}))
    if recipe is not None:
        faults += table_faults(recipe) + (_set_faults(recipe) or mean_faults(recipe))
        for client, own in recipe.clients.items() if checks else ():
            faults += checks["lora"]({**recipe.lora, **own.lora}, f'clients."{client}".lora')
        if not checks and recipe.evaluation.where == "server":
            faults.append(_NO_MODEL_HERE)
    if faults or recipe is None:
        raise RecipeError(f"recipe {name}: {len(faults)} fault(s)", faults)
    return recipe


def _library_checks() -> Mapping[str, Callable[[Mapping[str, Any], str], list[str]]]:
    """By table whose keys are a library's: finds its faults.

    None where these libraries are not installed, as at a server without a model: every node holds
    the recipe against its own.
    """
    try:
        # They take seconds to import, so only a command that runs a recipe does so.
        from fedexlora.local.arguments import training_faults
        from fedexlora.peft_bridge.load import lora_faults
    except ModuleNotFoundError as error:
        if not of_training(error):
            raise
        return {}
    return {"training": lambda found, _: training_faults(found), "lora": lora_faults}


def _set_faults(recipe: Recipe) -> list[str]:
    faults = []
    for name, table in recipe.evaluation.sets.items():
        key = f"evaluation.sets.{name}"
        faults += [
            f"{key}.data.{x}: has no effect, nothing is trained on it"
            for x in ("train", "max_train_rows")
            if x in table.data
        ]
        if table.task.get("kind", recipe.task.kind) != recipe.task.kind:
            faults.append(f"{key}.task.kind: the model is one for {recipe.task.kind}; leave it out")
            continue
        try:
            recipe.of_set(name)
        except ValidationError as error:
            found = (_describe(e["type"], e["loc"], e["msg"], e["input"]) for e in error.errors())
            faults += [f"{key}.{fault}" for fault in found]
    return faults


def _describe(kind: str, location: tuple[int | str, ...], message: str, found: object) -> str:
    """One of pydantic's faults in our words: the recipe's own key, expected, found."""
    keys, table = _resolve(location)
    key = ".".join(keys)
    if kind == "missing":
        return f"{key}: missing"
    if kind == "extra_forbidden":
        known = list(table.model_fields) if table else []
        near = difflib.get_close_matches(keys[-1], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    text = message.removeprefix("Value error, ")
    shown = "" if isinstance(found, dict) else f"; found {json.dumps(found, default=str)}"
    return f"{key}: {text[0].lower()}{text[1:]}{shown}"


def _resolve(location: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel] | None]:
    """The recipe's key of a pydantic location, without union tags, and the table that holds it."""
    keys: list[str] = []
    table: type[BaseModel] | None = Recipe
    tags: dict[str, type[BaseModel]] = {}
    holder: type[BaseModel] | None = Recipe
    for part in map(str, location):
        if part in tags:
            table, tags = tags[part], {}
            continue
        if table is None:
            break  # below a plain value pydantic adds the kinds that it tried
        keys.append(part)
        holder = table
        field = table.model_fields.get(part)
        members = _tables(field.annotation) if field else []
        if table in NAMED and part not in table.model_fields and len(keys) == NAMED[table]:
            continue  # the name of a client or a set
        tags = {str(m.model_fields["kind"].default): m for m in members if len(members) > 1}
        table = members[0] if len(members) == 1 else (table if tags else None)
    return keys, holder if not tags else None


def _tables(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for part in get_args(annotation) for table in _tables(part)]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
