"""What a node itself decides: its name, its data, its models, and what a recipe may ask of it.

None of it comes from the server, which sends a recipe without data. What of that recipe is run is
decided in ``permission.py``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fedexlora.data.config import TaskConfig
from fedexlora.data.partition_config import Column
from fedexlora.errors import RecipeError
from fedexlora.exchange.untrusted import CLIENT_NAME
from fedexlora.local.own_keys import DEVICE_NAMES, is_device_name

if TYPE_CHECKING:
    from fedexlora.rounds.recipe import Recipe

_FEDERATION = ("placement", "seed")
"""What of the federation's table concerns a client: it need not load anew when the rest changes."""
EVALUATION = ("where", "holdout", "every", "batch_size", "dtype")
"""What of the evaluation's table concerns a client, where the server does not score."""
TASK_OF_SERVER = frozenset({"generation", "choices"})
"""Fields of a task that concern scores alone, and that no node is sent."""


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
    validation: str | None = Field(default=None, min_length=1)
    """The same of rows of its own that it scores on, where clients score; if not given, a share of
    the training rows is held out for that."""
    max_train_rows: int | None = Field(default=None, gt=0)
    """Use a random subset of this many rows."""
    share: str | None = None
    """Only the rows that the recipe's partition gives to this client; all rows if not given."""


def _known_kind(kind: str) -> str:
    known = [task.model_fields["kind"].default for task in get_args(get_args(TaskConfig)[0])]
    if kind not in known:
        raise ValueError(f"expected one of {', '.join(known)}")
    return kind


def _known_device(name: str) -> str:
    if not is_device_name(name):
        raise ValueError(f"expected {DEVICE_NAMES}")
    return name


class NodeTask(_Table):
    """What a recipe may train on the node's rows; a server learns of no other column."""

    kinds: tuple[Annotated[str, AfterValidator(_known_kind)], ...] = Field(min_length=1)
    """Kinds of tasks."""
    columns: tuple[Column, ...] = Field(min_length=1)
    """Columns that a recipe may name: of texts, labels, prompts and completions, and the one that
    its partition divides by."""
    labels: tuple[str | int, ...] | None = Field(default=None, min_length=2)
    """All labels of a classification, in any order; a recipe must name the same. A server that
    could choose them would learn from the answer which ones the rows have."""

    @model_validator(mode="after")
    def _labels_are_stated(self) -> Self:
        if "classification" in self.kinds and self.labels is None:
            raise ValueError("labels: needed by kind 'classification'")
        return self


class NodeModel(_Table):
    """What is loaded where a recipe names a model."""

    source: str = Field(min_length=1)
    """A hub name, a folder, or ``package:NAME/PATH``."""
    revision: str | None = Field(default=None, min_length=1)
    """The hub's branch, tag or commit; the default branch if not given. A recipe that names a
    revision must name this one."""


def _model_table(given: object) -> object:
    return {"source": given} if isinstance(given, str) else given


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
    task: NodeTask
    models: dict[str, Annotated[NodeModel, BeforeValidator(_model_table)]]
    """By the name that a recipe may give a model: what the node loads for it; a text is a source
    without a revision."""
    limits: Limits = Limits()
    use_cpu: bool = False
    """Train on the processor even if there is a GPU; ``device = "cpu"`` says the same."""
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """Where the model is, whatever the recipe says: ``auto`` (the one GPU that is visible, or else
    the processor), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``."""
    idle: float = Field(default=900.0, gt=0)
    """Seconds without a message after which the loaded model is let go of."""

    @model_validator(mode="after")
    def _one_device(self) -> Self:
        if self.use_cpu and self.device not in ("auto", "cpu"):
            raise ValueError(f"device: {self.device!r} is not use_cpu = true; give one of the two")
        return self


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

    What is generated for scores is left out: nodes have no part in that. How versions are scored is
    sent where the server does not do it.

    Args:
        recipe: the server's.
        task: the task's table.
    """
    document = recipe.model_dump(
        mode="json", exclude_none=True, exclude={"data", "evaluation", "tracking"}
    )
    federation = {key: document["federation"][key] for key in _FEDERATION}
    # Where a node trains is for the node to say.
    document["training"].pop("device", None)
    if recipe.training["schedule"] == "run":
        federation["rounds"] = recipe.federation.rounds
    learned = {key: value for key, value in task.items() if key not in TASK_OF_SERVER}
    sent = {**document, "task": learned, "federation": federation}
    if recipe.evaluation.where == "server":
        return sent
    table = recipe.evaluation.model_dump(mode="json", exclude_none=True)
    return {**sent, "evaluation": {key: table[key] for key in EVALUATION if key in table}}
