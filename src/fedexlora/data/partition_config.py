"""What a recipe says about the division of its training rows among clients."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Column: TypeAlias = Annotated[str, Field(min_length=1)]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class IidPartition(_Config):
    """Every client gets an equal random share of the training rows."""

    kind: Literal["iid"] = "iid"
    """Selects this way of dividing the rows."""
    clients: int = Field(ge=1)
    """Number of clients."""


class DirichletPartition(_Config):
    """Each label's rows are divided by proportions drawn from a Dirichlet distribution."""

    kind: Literal["dirichlet"] = "dirichlet"
    """Selects this way of dividing the rows."""
    clients: int = Field(ge=1)
    """Number of clients."""
    alpha: float = Field(gt=0, allow_inf_nan=False)
    """Concentration: small values (0.1) give clients very different labels, large ones similar."""
    column: Column | None = None
    """The column whose values are divided; the task's label column if not given."""
    min_rows: int = Field(default=1, ge=1)
    """Fewest rows of a client; the proportions are drawn again until every client has them."""


class ByColumnPartition(_Config):
    """One client for every distinct value of a column: a division that the data already has."""

    kind: Literal["by_column"] = "by_column"
    """Selects this way of dividing the rows."""
    column: Column
    """The column that names a row's client."""


PartitionConfig: TypeAlias = Annotated[
    IidPartition | DirichletPartition | ByColumnPartition, Field(discriminator="kind")
]
"""How the training rows are divided among the clients; `kind` selects one of three."""
