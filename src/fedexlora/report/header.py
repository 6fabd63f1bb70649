"""What holds for a whole run, of ``run.json``: where it ran, on what, and the scores before it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Machine(BaseModel):
    """Where a run ran."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    python: str = ""
    system: str = ""
    processor: str = ""
    cores: int | None = None
    torch_threads: int | None = None
    cuda: str | None = None
    device: str | None = None


class Environment(BaseModel):
    """Whose code ran a run, and where."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    fedexlora: str = ""
    packages: dict[str, str | None] = {}
    machine: Machine = Machine()


class Resumed(Environment):
    """The same of what a run went on with."""

    after_round: int


class Header(Environment):
    """``run.json``, as far as a report shows it."""

    data: str | None = None
    """Fingerprint of the rows; None where the server has none."""
    base: str = ""
    """Fingerprint of the base weights."""
    precision: str = ""
    clients: dict[str, int] = {}
    """Training rows by client."""
    validation_rows: int | None = None
    headline: str = ""
    initial_metrics: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    weights: dict[str, float] = {}
    """Norms of the adapted frozen weights; none in records of before."""
    resumed: tuple[Resumed, ...] = ()
