"""What a node itself decides: its name, its data, its models, and what a recipe may ask of it.

None of it comes from the server. The server sends a recipe without data; what it names is a model
that the node has listed, and training options out of a fixed set, none of which is a path.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedexlora.errors import RecipeError
from fedexlora.exchange.untrusted import CLIENT_NAME

if TYPE_CHECKING:
    from fedexlora.engine.recipe import Recipe

TRAINING_OPTIONS = frozenset(
    {
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "bf16",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "label_smoothing_factor",
        "learning_rate",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_grad_norm",
        "max_steps",
        "num_train_epochs",
        "optim",
        "optim_args",
        "per_device_train_batch_size",
        "train_sampling_strategy",
        "use_cpu",
        "warmup_ratio",
        "warmup_steps",
        "weight_decay",
    }
)
"""Fields of ``TrainingArguments`` that a server may set: numbers and names, no paths or hosts."""
LORA_OPTIONS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "modules_to_save",
        "r",
        "rank_pattern",
        "target_modules",
        "trainable_token_indices",
        "use_rslora",
    }
)
"""Fields of ``LoraConfig`` that a server may set."""
_FEDERATION = ("method", "next_adapter", "placement", "seed")
"""What of the federation's table concerns a client: it need not load anew when the rest changes."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class NodeData(_Table):
    """The node's own rows."""

    source: str = Field(min_length=1)
    """A folder with a training file, or the name of a data set on the hub."""
    config: str | None = None
    """The hub data set's configuration."""
    revision: str | None = None
    """The hub's branch, tag or commit."""
    train: str = Field(default="train", min_length=1)
    """The training split: a hub split, or a file of the folder."""
    max_train_rows: int | None = Field(default=None, gt=0)
    """Use a random subset of this many rows."""
    share: str | None = None
    """Only the rows that the recipe's partition gives to this client; all rows if not given."""


class Limits(_Table):
    """The most that a recipe may ask for."""

    max_rank: int = Field(default=256, ge=1)
    """Of any adapted layer."""
    max_epochs: float = Field(default=10.0, gt=0)
    """Of one round."""
    max_steps: int = Field(default=100_000, ge=1)
    """Of one round, where a recipe counts steps."""
    max_length: int = Field(default=8192, ge=1)
    """Tokens of a row."""
    max_batch: int = Field(default=256, ge=1)
    """Rows of a batch on one device."""


class Node(_Table):
    """One node's configuration."""

    client: str = Field(pattern=CLIENT_NAME)
    """Its name in the federation."""
    home: Path
    """A folder that is the node's own: the version that it holds, and a log."""
    data: NodeData
    models: dict[str, str]
    """By the name that a recipe may give a model: what the node loads for it."""
    limits: Limits = Limits()
    use_cpu: bool = False
    """Train on the processor even if there is a GPU."""
    idle: float = Field(default=900.0, gt=0)
    """Seconds without a message after which the loaded model is let go of."""

    def recipe(self, sent: Mapping[str, Any]) -> Recipe:
        """The recipe that the node runs, of the one that the server sent.

        Raises:
            RecipeError: with everything that the node does not allow, or that is wrong.
        """
        # Every message starts a process that reads this configuration; it must not load PyTorch.
        from fedexlora.engine.recipe import parse_recipe

        faults = self._faults(sent)
        if faults:
            raise RecipeError(f"node {self.client!r} refuses the recipe", faults)
        model = {**sent["model"], "source": self.models[sent["model"]["source"]]}
        data = self.data.model_dump(exclude={"share"}, exclude_none=True)
        training = dict(sent.get("training", {}))
        if self.use_cpu:
            training["use_cpu"] = True
        document = {**sent, "model": model, "data": data, "training": training}
        recipe = parse_recipe(document, "of the server")
        self._check_limits(recipe)
        return recipe

    def _faults(self, sent: Mapping[str, Any]) -> list[str]:
        tables = {name: sent.get(name) for name in ("model", "training", "lora", "clients")}
        faults = [
            f"{name}: expected a table, found {table!r}"
            for name, table in tables.items()
            if not isinstance(table, dict)
        ]
        if faults:
            return faults
        source = sent["model"].get("source")
        if source not in self.models:
            known = ", ".join(map(repr, self.models)) or "none"
            faults.append(f"model.source: {source!r} is not one of this node's models ({known})")
        given = {
            "training": (sent["training"], TRAINING_OPTIONS),
            "lora": (sent["lora"], LORA_OPTIONS),
        }
        return faults + [
            f"{table}.{key}: a server may not set it"
            for table, (options, allowed) in given.items()
            for key in options
            if key not in allowed
        ]

    def _check_limits(self, recipe: Recipe) -> None:
        limits, training = self.limits, recipe.training
        own = recipe.clients.get(self.client)
        lora = {**recipe.lora, **(own.lora if own else {})}
        ranks = [lora.get("r", 8), *lora.get("rank_pattern", {}).values()]
        asked = {
            "lora.r": (max(ranks), limits.max_rank),
            "training.num_train_epochs": (training.get("num_train_epochs", 1), limits.max_epochs),
            "training.max_steps": (training.get("max_steps", -1), limits.max_steps),
            "task.max_length": (recipe.task.max_length, limits.max_length),
            "training.per_device_train_batch_size": (
                training.get("per_device_train_batch_size", 8),
                limits.max_batch,
            ),
        }
        faults = [
            f"{key}: {value} is more than this node allows ({most})"
            for key, (value, most) in asked.items()
            if value > most
        ]
        if faults:
            raise RecipeError(f"node {self.client!r} refuses the recipe", faults)


def load_node(path: Path) -> Node:
    """Read a node's configuration.

    Raises:
        RecipeError: if it cannot be read; with all unknown keys and invalid values at once.
    """
    try:
        return Node.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"node {path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(f"node {path}: {len(faults)} fault(s)", faults) from error
    except ValueError as error:
        raise RecipeError(f"node {path}: not valid TOML: {error}") from error


def recipe_for_nodes(recipe: Recipe, task: Mapping[str, Any]) -> dict[str, Any]:
    """What the server sends of its recipe: no data, and the task with its labels.

    Args:
        recipe: the server's.
        task: the task's table.
    """
    document = recipe.model_dump(mode="json", exclude_none=True, exclude={"data", "evaluation"})
    federation = {key: document["federation"][key] for key in _FEDERATION}
    return {**document, "task": dict(task), "federation": federation}
