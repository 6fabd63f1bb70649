"""What a comparison of methods found: the content of ``compare.json``.

    DIR/compare.json          this record, rewritten whenever a cell ends
    DIR/runs/ARM/seed-N/      one cell: an ordinary run's folder
    DIR/runs/ARM/seed-N.log   what the cell's process printed

An *arm* is a method with one choice of the grid's settings, and a *cell* is one arm with one seed.
An arm is called by its method and settings, ``fedex`` or ``fedex method.next_adapter=svd``; arms
stand in the order in which they were asked for, and cells arm by arm, seed by seed. A cell without
a result is a hole, with its reason. Everything but the cells' curves is computed from the curves,
over the cells that have a result.

Scores of every metric are those after the last round. Bytes and seconds are sums since the start,
over all clients and phases.
"""

from __future__ import annotations

from pydantic import Field

from fedexlora.exchange.records import BytesRecord, Record


class PointRecord(Record):
    """Where a cell was after one round."""

    round: int
    """0 is before the first round."""
    metrics: dict[str, float]
    """Scores, by metric; empty after rounds without scores."""
    bytes: BytesRecord
    """Moved since the start."""
    seconds: float
    """Since the start: the phases of all rounds; what comes before round 1 is in none."""


class CellRecord(Record):
    """One run."""

    arm: str
    method: str
    settings: dict[str, str]
    """The keys of the grid and the values that this cell has of them, as in a recipe."""
    seed: int
    run: str
    """Its folder, relative to the one of ``compare.json``, with slashes."""
    hole: str | None
    """Why it has no result; None if the run is finished."""
    curve: tuple[PointRecord, ...]
    """Round 0, and every round that is finished; empty in a cell that has not begun."""


class StatisticRecord(Record):
    """One number over the seeds of an arm."""

    mean: float
    deviation: float | None
    """The standard deviation of a sample, with n - 1; None of a single seed."""
    count: int
    """How many seeds it is of."""


class DifferenceRecord(Record):
    """An arm's score less the baseline's, seed by seed."""

    mean: float
    deviation: float | None
    """As of :class:`StatisticRecord`."""
    low: float | None
    """The lower end of the bootstrap interval of the mean; None with fewer than two seeds."""
    high: float | None
    seeds: tuple[int, ...]
    """Those that both arms have a result for."""


class TargetRecord(Record):
    """What it took until the headline was as good as the target for the first time."""

    reached: int
    """How many of the finished seeds got there; the numbers below are of these."""
    rounds: StatisticRecord | None
    bytes: StatisticRecord | None
    """Up and down together."""
    seconds: StatisticRecord | None


class ArmRecord(Record):
    """A method with one choice of settings, over its seeds."""

    arm: str
    method: str
    title: str
    """The method's, for people."""
    settings: dict[str, str]
    seeds: tuple[int, ...]
    """Those with a result."""
    scores: dict[str, StatisticRecord]
    """By metric, after the last round."""
    differences: dict[str, DifferenceRecord]
    """By metric, against the baseline; empty for the baseline itself, or without a common seed."""
    bytes_up: StatisticRecord | None
    """All rounds; None without a result."""
    bytes_down: StatisticRecord | None
    seconds: StatisticRecord | None
    target: TargetRecord | None
    """None if no target was named."""
    within_budget: StatisticRecord | None
    """The headline after the last scored round that is within the budget of bytes; of the seeds
    that have one, round 0 included."""


class SeedRecord(Record):
    """Whether the runs of one seed started from the same, by what their headers say."""

    seed: int
    data: bool
    """The same rows, in the same order, divided among the same clients."""
    adapter: bool
    """The same initial adapter and heads."""
    differences: tuple[str, ...]
    """Which arm differs in what; empty if none does."""


class ComparisonRecord(Record):
    """A comparison."""

    schema_version: int = 1
    fedexlora: str
    """The package's version."""
    recipe: str
    """The file that was named."""
    command: str
    """What makes it again, from the folder in which it was started."""
    rounds: int
    headline: str
    """The metric that arms are compared by."""
    lower_is_better: tuple[str, ...]
    """The metrics of which less is more; of all others more is."""
    seeds: tuple[int, ...]
    baseline: str | None
    """The arm that differences are taken from."""
    confidence: float = Field(gt=0.0, lt=1.0)
    """Of the bootstrap intervals."""
    target: float | None
    """Of the headline."""
    budget: int | None
    """Bytes, up and down together; if none was named, what the cheapest arm moves in all."""
    same_start: tuple[SeedRecord, ...]
    """By seed with at least two runs that have begun."""
    arms: tuple[ArmRecord, ...]
    cells: tuple[CellRecord, ...]


def less_is_better(metric: str) -> bool:
    """Whether a score is the better the smaller it is; counts, such as of answers unread, are.

    >>> [less_is_better(name) for name in ("loss", "gsm8k.perplexity", "accuracy", "f1/unparsed")]
    [True, True, False, True]
    """
    return "/" in metric or metric.rpartition(".")[2] in ("loss", "perplexity", "mse")
