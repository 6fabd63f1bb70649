"""The deviation analysis of runs as JSON: the numbers of its figures."""

from __future__ import annotations

from math import isfinite

from fedexlora.exchange.records import Record
from fedexlora.report.deviation_curves import (
    against_weights,
    bf16_loss,
    by_epochs,
    by_projection,
    epochs,
    norm,
    rank,
    share,
)
from fedexlora.report.run_set import Cell, RunSet


class RoundDeviationRecord(Record):
    """One round. What the records of the run lack is None."""

    round: int
    deviation: float
    """|R| / |M| over all modules."""
    residual: float | None
    """|R|, scaled."""
    modules: dict[str, float]
    """|R| / |M| by module."""
    projections: dict[str, float | None]
    """The same over all modules of a projection."""
    remainder: float | None
    """The norm of the cumulative remainder over that of the frozen weights."""
    rank: float | None
    """The mean rank at which it is held, over the modules where it is no dense matrix."""
    bf16_loss: float | None
    """The share of it that a fold into bfloat16 weights would lose."""


class RunDeviationRecord(Record):
    """One run."""

    run: str
    folder: str
    method: str
    seed: int | None
    local_epochs: float | None
    rounds: tuple[RoundDeviationRecord, ...]


class EpochsRecord(Record):
    """Round 1 of all runs of a method with as many local epochs."""

    method: str
    local_epochs: float
    deviation: float
    """The mean of their |R| / |M|."""
    runs: int


class DeviationAnalysisRecord(Record):
    """What averaging the factors would lose, as runs recorded it."""

    schema_version: int = 1
    runs: tuple[RunDeviationRecord, ...]
    by_epochs: tuple[EpochsRecord, ...]
    """Empty where no method has runs with different numbers of local epochs."""


def deviation_analysis(runs: RunSet) -> DeviationAnalysisRecord:
    """The analysis, out of records alone.

    Args:
        runs: at least one.
    """
    return DeviationAnalysisRecord(
        runs=tuple(map(_run, runs.cells)),
        by_epochs=tuple(
            EpochsRecord(
                method=method,
                local_epochs=number,
                deviation=sum(values) / len(values),
                runs=len(values),
            )
            for method, by in by_epochs(runs).items()
            for number, values in by.items()
        ),
    )


def _run(cell: Cell) -> RunDeviationRecord:
    run = cell.run
    projections = by_projection(run.modules)
    curves = {
        "residual": norm(cell),
        "remainder": against_weights(cell),
        "rank": rank(cell),
        "bf16_loss": bf16_loss(cell),
    }
    rounds = []
    for number, value in share(cell).items():
        place = int(number) - 1
        shares = run.modules.figures["deviation"][place]
        pooled = zip(run.modules.projections, projections[:, place], strict=True)
        rounds.append(
            RoundDeviationRecord(
                round=int(number),
                deviation=value,
                modules=dict(zip(run.modules.names, map(float, shares), strict=True)),
                projections={name: float(x) if isfinite(x) else None for name, x in pooled},
                **{name: curve.get(number) for name, curve in curves.items()},
            )
        )
    return RunDeviationRecord(
        run=cell.label,
        folder=str(run.folder),
        method=run.method,
        seed=run.seed,
        local_epochs=epochs(cell),
        rounds=tuple(rounds),
    )
