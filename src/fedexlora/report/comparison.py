"""The table of a comparison: means and spreads over seeds, and differences paired by seed.

What ``compare`` computed is taken from its record; of runs that were named one by one it is
computed here, and without intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from fedexlora.exchange.comparison_records import DifferenceRecord, StatisticRecord
from fedexlora.report.run_set import Cell, RunSet
from fedexlora.report.score_charts import metrics
from fedexlora.report.tables import Column, Form, Table, Value, show

_MOST = 6
"""Metrics beside the headline."""


def comparison_table(runs: RunSet) -> Table:
    """A row for every arm: scores after the last round, what they cost, what averaging loses."""
    baseline = baseline_of(runs)
    names = metrics(runs)[: _MOST + 1]
    columns = [Column("arm"), Column("runs", "count")]
    columns += [Column(name, "spread") for name in names]
    if baseline is not None:
        columns.append(Column(f"{runs.headline} against the baseline", "spread"))
    columns += [Column("bytes", "spread"), Column("time", "spread")]
    columns += [Column("worst error", "error"), Column("averaging loses, at most", "share")]
    return Table.of(columns, [_row(runs, arm, names, baseline) for arm in runs.arms])


def last_scores_table(runs: RunSet) -> Table:
    """A row for every run: all scores after its last scored round."""
    names = dict.fromkeys(name for cell in runs.cells for name in _last(cell)[1])
    rows = []
    for cell in runs.cells:
        round_, found = _last(cell)
        rows.append((cell.label, round_, *(found.get(name) for name in names)))
    columns = [Column(name, "count" if "/" in name else "score") for name in names]
    return Table.of([Column("run"), Column("round", "count"), *columns], rows)


def target_table(runs: RunSet) -> Table | None:
    """What it took to reach the comparison's target, and the score within its budget."""
    record = runs.comparison
    if record is None or (record.target is None and record.budget is None):
        return None
    rows = []
    for arm in record.arms:
        found = arm.target
        rows.append(
            (
                arm.arm,
                f"{found.reached} of {len(arm.seeds)}" if found else None,
                *(spread(getattr(found, part) if found else None, form) for part, form in _COSTS),
                spread(arm.within_budget, "score"),
            )
        )
    names = ("reached by", "rounds", "bytes", "time", "score within the budget")
    return Table.of([Column("arm"), *(Column(name, "spread") for name in names)], rows)


_COSTS: Sequence[tuple[str, Form]] = (
    ("rounds", "number"),
    ("bytes", "size"),
    ("seconds", "seconds"),
)


def baseline_of(runs: RunSet) -> str | None:
    """The arm that differences are taken from; of runs that were named, that of the first."""
    if runs.comparison is not None:
        return runs.comparison.baseline
    return next(iter(runs.arms)) if len(runs.arms) > 1 and runs.headline else None


def spread(value: StatisticRecord | None, form: Form) -> str | None:
    """A mean, and its standard deviation where there is one.

    >>> spread(StatisticRecord(mean=0.5, deviation=0.01, count=3), "score")
    '0.5000 ± 0.0100'
    """
    if value is None:
        return None
    said = show(value.mean, form)
    return said if value.deviation is None else f"{said} ± {show(value.deviation, form)}"


def difference_text(value: DifferenceRecord | None) -> str | None:
    """A mean difference with its spread, its interval, and how many seeds it is of.

    >>> one = {"deviation": None, "low": None, "high": None, "seeds": (0,)}
    >>> difference_text(DifferenceRecord(mean=0.05, **one))
    '+0.0500 (1 seed)'
    """
    if value is None:
        return None
    said = f"{value.mean:+.4f}"
    if value.deviation is not None:
        said += f" ± {value.deviation:.4f}"
    if value.low is not None and value.high is not None:
        said += f" [{value.low:+.4f}, {value.high:+.4f}]"
    return f"{said} ({len(value.seeds)} seed{'' if len(value.seeds) == 1 else 's'})"


def statistic(values: Sequence[float]) -> StatisticRecord | None:
    """Mean and standard deviation of a sample; None of nothing."""
    if not values:
        return None
    deviation = stdev(values) if len(values) > 1 else None
    return StatisticRecord(mean=mean(values), deviation=deviation, count=len(values))


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> DifferenceRecord | None:
    """An arm less the baseline, of the seeds that both have; None without one."""
    seeds = sorted(arm.keys() & baseline.keys())
    found = statistic([arm[seed] - baseline[seed] for seed in seeds])
    if found is None:
        return None
    return DifferenceRecord(
        mean=found.mean, deviation=found.deviation, low=None, high=None, seeds=tuple(seeds)
    )


def _row(runs: RunSet, arm: str, names: Sequence[str], baseline: str | None) -> tuple[Value, ...]:
    cells = runs.arms[arm]
    records = [record for cell in cells for record in cell.run.rounds]
    against: tuple[Value, ...] = ()
    if baseline is not None:
        against = ("the baseline" if arm == baseline else _difference(runs, arm, baseline),)
    moved = [float(sum(r.bytes.up + r.bytes.down for r in c.run.rounds)) for c in cells]
    took = [sum(sum(r.seconds.values()) for r in c.run.rounds) for c in cells]
    return (
        arm,
        len(cells),
        *(spread(_score(runs, arm, name), "score") for name in names),
        *against,
        spread(statistic(moved), "size"),
        spread(statistic(took), "seconds"),
        max((r.certificate.worst_error for r in records), default=None),
        max((r.deviation for r in records), default=None),
    )


def _score(runs: RunSet, arm: str, name: str) -> StatisticRecord | None:
    if runs.comparison is not None:
        by = {found.arm: found for found in runs.comparison.arms}
        return by[arm].scores.get(name) if arm in by else None
    return statistic(
        [value for values in _by_seed(runs.arms[arm], name).values() for value in values]
    )


def _difference(runs: RunSet, arm: str, baseline: str) -> str | None:
    if runs.comparison is not None:
        by = {found.arm: found for found in runs.comparison.arms}
        return difference_text(by[arm].differences.get(runs.headline)) if arm in by else None
    one, other = (_paired(runs.arms[x], runs.headline) for x in (arm, baseline))
    return difference_text(difference(one, other))


def _paired(cells: Sequence[Cell], name: str) -> dict[int, float]:
    """The score by seed; a seed that has several runs has no pair."""
    return {seed: x[0] for seed, x in _by_seed(cells, name).items() if len(x) == 1}


def _by_seed(cells: Sequence[Cell], name: str) -> dict[int, list[float]]:
    """The last scores of whole runs by seed."""
    found: dict[int, list[float]] = {}
    for cell in cells:
        last = _last(cell)[1]
        if cell.run.whole and name in last and cell.run.seed is not None:
            found.setdefault(cell.run.seed, []).append(last[name])
    return found


def _last(cell: Cell) -> tuple[int | None, dict[str, float]]:
    """The last round with scores, and those."""
    found = [(version, dict(x)) for version, x in cell.run.scored.items() if version]
    return found[-1] if found else (None, {})
