"""What the runs of a comparison say together: statistics over seeds, paired differences, costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy.stats import bootstrap

from fedexlora.exchange.comparison_records import (
    ArmRecord,
    CellRecord,
    DifferenceRecord,
    PointRecord,
    StatisticRecord,
    TargetRecord,
    less_is_better,
)

CONFIDENCE = 0.95
_RESAMPLES = 9999


@dataclass(frozen=True, slots=True)
class Terms:
    """What arms are compared by."""

    headline: str
    baseline: str | None = None
    """The arm that differences are taken from."""
    target: float | None = None
    """Of the headline."""
    budget: int | None = None
    """Bytes, up and down together."""


def arm_records(
    cells: Sequence[CellRecord], titles: Mapping[str, str], terms: Terms
) -> list[ArmRecord]:
    """Every arm over its seeds, in the order of the cells.

    Args:
        cells: of all arms; holes do not count.
        titles: of the methods, by name.
        terms: what arms are compared by.
    """
    arms: dict[str, list[CellRecord]] = {}
    for cell in cells:
        arms.setdefault(cell.arm, []).append(cell)
    finished = {name: [c for c in group if c.hole is None] for name, group in arms.items()}
    base = finished.get(terms.baseline or "", [])
    found = []
    for name, group in arms.items():
        first, done = group[0], finished[name]
        own = [] if name == terms.baseline else base
        found.append(
            ArmRecord(
                arm=name,
                method=first.method,
                title=titles.get(first.method, first.method),
                settings=first.settings,
                seeds=tuple(cell.seed for cell in done),
                scores=_scores(done),
                differences=_differences(done, own),
                bytes_up=_last(done, lambda point: point.bytes.up),
                bytes_down=_last(done, lambda point: point.bytes.down),
                seconds=_last(done, lambda point: point.seconds),
                target=_target(done, terms),
                within_budget=_within(done, terms),
            )
        )
    return found


def cheapest(cells: Sequence[CellRecord]) -> int | None:
    """The bytes of the finished cell that moves the fewest; None without one."""
    done = (cell.curve[-1] for cell in cells if cell.hole is None)
    return min((_moved(point) for point in done), default=None)


def _scores(cells: Sequence[CellRecord]) -> dict[str, StatisticRecord]:
    names = dict.fromkeys(name for cell in cells for name in cell.curve[-1].metrics)
    every = {
        name: [c.curve[-1].metrics[name] for c in cells if name in c.curve[-1].metrics]
        for name in names
    }
    return {name: _of(values) for name, values in every.items()}


def _differences(
    cells: Sequence[CellRecord], base: Sequence[CellRecord]
) -> dict[str, DifferenceRecord]:
    """By metric, the scores less those of the baseline with the same seed."""
    theirs = {cell.seed: cell.curve[-1].metrics for cell in base}
    pairs: dict[str, dict[int, float]] = {}
    for cell in cells:
        for name, score in cell.curve[-1].metrics.items():
            if name in theirs.get(cell.seed, {}):
                pairs.setdefault(name, {})[cell.seed] = score - theirs[cell.seed][name]
    return {name: _difference(values) for name, values in pairs.items()}


def _difference(by_seed: Mapping[int, float]) -> DifferenceRecord:
    values = list(by_seed.values())
    low, high = interval(values)
    statistic = _of(values)
    return DifferenceRecord(
        mean=statistic.mean,
        deviation=statistic.deviation,
        low=low,
        high=high,
        seeds=tuple(by_seed),
    )


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The percentile bootstrap interval of a mean; of fewer than two values there is none.

    It is drawn with a fixed seed: the same values have the same interval. Of a few seeds it is
    narrower than it should be, as it knows no values but these.

    >>> interval([0.25])
    (None, None)
    >>> interval([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    if len(values) < 2:
        return None, None
    found = bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def _target(cells: Sequence[CellRecord], terms: Terms) -> TargetRecord | None:
    """What it took to be as good as the target."""
    if terms.target is None:
        return None
    sign = -1.0 if less_is_better(terms.headline) else 1.0
    reached = [
        point
        for cell in cells
        if (point := _first(cell.curve, terms.headline, sign, terms.target)) is not None
    ]
    if not reached:
        return TargetRecord(reached=0, rounds=None, bytes=None, seconds=None)
    return TargetRecord(
        reached=len(reached),
        rounds=_of([float(point.round) for point in reached]),
        bytes=_of([float(_moved(point)) for point in reached]),
        seconds=_of([point.seconds for point in reached]),
    )


def _first(
    curve: Sequence[PointRecord], name: str, sign: float, target: float
) -> PointRecord | None:
    good = (p for p in curve if name in p.metrics and sign * p.metrics[name] >= sign * target)
    return next(good, None)


def _within(cells: Sequence[CellRecord], terms: Terms) -> StatisticRecord | None:
    """The headline after the last scored round that is within the budget."""
    if terms.budget is None:
        return None
    scores = []
    for cell in cells:
        paid = [
            point.metrics[terms.headline]
            for point in cell.curve
            if terms.headline in point.metrics and _moved(point) <= terms.budget
        ]
        scores += paid[-1:]
    return _of(scores) if scores else None


def _last(
    cells: Sequence[CellRecord], value: Callable[[PointRecord], float]
) -> StatisticRecord | None:
    return _of([float(value(cell.curve[-1])) for cell in cells]) if cells else None


def _moved(point: PointRecord) -> int:
    return point.bytes.up + point.bytes.down


def _of(values: Sequence[float]) -> StatisticRecord:
    deviation = stdev(values) if len(values) > 1 else None
    return StatisticRecord(mean=fmean(values), deviation=deviation, count=len(values))
