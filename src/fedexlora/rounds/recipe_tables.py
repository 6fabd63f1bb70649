"""The tables of a recipe, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedexlora.exchange.untrusted import CLIENT_NAME
from fedexlora.peft_bridge.arithmetic import Width

ClientName = Annotated[str, Field(pattern=CLIENT_NAME)]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Table(BaseModel):
    """A table: immutable, and without keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelTable(Table):
    """The pre-trained model that all clients share."""

    source: str = Field(min_length=1)
    """A hub name, a folder, or ``package:NAME/PATH``: a folder inside an installed package."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the default branch if not given."""
    dtype: Width = "float32"
    """Of the frozen weights, and of the arithmetic where they are quantised."""
    quantization: Literal["int8", "nf4", "fp4"] | None = None
    """Store the frozen linear layers in bitsandbytes' 8 or 4 bits."""


class MethodTable(BaseModel):
    """How adapters are aggregated: a method of ``fedexlora methods``, and that method's options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str = "fedex"
    """The method's name."""

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options, by name."""
        return dict(self.model_extra or {})


class FederationTable(Table):
    """How the clients work together."""

    placement: Literal["auto", "fold", "side"] = "auto"
    """Where the remainder lives: in the frozen weight, or beside it. ``auto`` is exact, in the
    arithmetic of training and scoring too."""
    reduce_on: str = Field(default="cpu", pattern=r"^(cpu|cuda(:[0-9]+)?)$")
    """Where the server reduces updates, one module after the other: ``cpu``, ``cuda`` or
    ``cuda:N``."""
    clients_per_round: int | None = Field(default=None, ge=1)
    """How many clients take part in a round, drawn by seed and round; all if not given."""
    fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    """The same as a share of all clients, rounded up."""
    min_updates: int = Field(default=1, ge=1)
    """A round with fewer usable updates stops the run, which can be resumed."""
    deadline: float | None = Field(default=None, gt=0.0)
    """Seconds after which a client's update is left out of its round; none if not given."""
    stale: Literal["refuse", "accept"] = "refuse"
    """Whether an update that comes in a later round counts there, by the square root of its age
    less."""
    weighting: Literal["examples", "uniform", "capped"] = "examples"
    """A client's weight: its number of training rows, 1, or that number up to ``weight_cap``."""
    weight_cap: int | None = Field(default=None, ge=1)
    """The most training rows that count, for ``capped``."""
    robust: Literal["clip", "multi_krum", "trimmed_mean", "geometric_median"] | None = None
    """What is done against bad updates before they are summed; nothing if not given."""
    clip_norm: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """The longest change of the global model, for ``clip``; the round's median if not given."""
    bad_share: float | None = Field(default=None, gt=0.0, lt=0.5)
    """The share of a round's updates that may be bad, rounded up, for ``multi_krum`` and
    ``trimmed_mean``."""
    history: int = Field(default=4, ge=0)
    """How many rounds a client may have missed and still get no more than their pieces."""
    allow: tuple[ClientName, ...] | None = Field(default=None, min_length=1)
    """The clients that may take part, by name; all if not given. A resumed run may change it."""
    exclude: tuple[ClientName, ...] = ()
    """Clients that may not, by name: one whose updates strain the certificate, say. A resumed run
    may change it."""
    rounds: int = Field(default=10, ge=1)
    """Number of federated rounds."""
    patience: int | None = Field(default=None, ge=1)
    """End the run once so many versions have no better headline score than one before; a resumed
    run may change it."""
    seed: int = Field(default=0, ge=0)
    """Where all randomness comes from."""


class EvaluationSet(Table):
    """Other rows that the model is scored on, as far as they differ from the validation rows."""

    data: dict[str, Any] = Field(default_factory=dict)
    """Values of ``[data]``: ``source``, ``validation``, ..."""
    task: dict[str, Any] = Field(default_factory=dict)
    """Values of ``[task]``: its columns, templates and metrics."""


class EvaluationTable(Table):
    """How the global model is scored, before the first round and after others."""

    where: Literal["server", "clients", "none"] = "server"
    """Who scores it: the server, on its validation rows; the clients, each on held-out rows of its
    own; or nobody."""
    holdout: float = Field(default=0.1, gt=0.0, le=0.5)
    """With ``where = "clients"``: the share of every client's rows that is held out for scores."""
    every: int = Field(default=1, ge=1)
    """After every this many rounds, and after the last one."""
    batch_size: int = Field(default=64, ge=1)
    """Rows at a time; changes speed and memory, not results beyond rounding."""
    dtype: Width | None = None
    """In which products are computed; that of the model's weights if not given."""
    sets: dict[SetName, EvaluationSet] = Field(default_factory=dict)
    """By name: what the model is scored on beside the validation rows."""
    mean: tuple[str, ...] | None = Field(default=None, min_length=2)
    """Scores, those of sets as ``NAME.METRIC``, whose mean is the run's headline; none if not
    given."""


class TrackingTable(Table):
    """Where rounds are written to beside the run's own record."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Which trackers are told of every round; none if not given. A resumed run may change it."""
    project: str = Field(default="fedexlora", min_length=1)
    """Under which name, for ``wandb`` and ``mlflow``."""


class ClientTable(Table):
    """What one client has otherwise than the others."""

    lora: dict[str, Any]
    """Rank and scaling of its adapter: fields of PEFT's ``LoraConfig``."""


NAMED: Mapping[type[BaseModel], int] = {ClientTable: 2, EvaluationSet: 3}
"""Tables that stand under names, and how many keys such a name ends."""
