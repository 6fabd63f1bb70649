"""Bytes and seconds: by round of a run alone, by arm of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from fedexlora.report.chart import SERIES, Chart, draw, label, legend_below, legend_height
from fedexlora.report.run_set import Cell, RunSet
from fedexlora.report.tables import Column, Form, Table, Value

PHASES = ("ship", "train", "screen", "aggregate", "apply", "certify", "evaluate")
"""In the order of a round; phases of other names follow."""
_Read = Callable[[Cell, int], Mapping[str, float]]
"""Of a round, by its place: kinds of bytes or phases, and how much."""
_MOST_ROUNDS = 60
"""Bars of a figure: beyond, rounds are added up in groups."""


def cost_charts(runs: RunSet) -> list[Chart]:
    """The bytes and the seconds."""
    drawn = [cell for cell in runs.cells if cell.run.rounds]
    if not drawn:
        return []
    if runs.alone is not None:
        return [
            _by_round(drawn[0], _bytes_of, "bytes", "Bytes by round", "MB", 1e6),
            _by_round(drawn[0], _seconds_of, "seconds", "Seconds by phase", "s", 1.0),
        ]
    return [
        _by_run(drawn, _bytes_of, "bytes", "Bytes by run", "MB", 1e6),
        _by_run(drawn, _seconds_of, "seconds", "Seconds by run and phase", "s", 1.0),
    ]


def cost_table(runs: RunSet) -> Table:
    """A row for every run: what all of its rounds took, and the share of each phase."""
    names = _phases(runs.cells)
    rows: list[Sequence[Value]] = []
    for cell in runs.cells:
        bytes_, seconds = _total(cell, _bytes_of), _total(cell, _seconds_of)
        whole = sum(seconds.values())
        shares = (seconds.get(name, 0.0) / whole if whole else None for name in names)
        both = (bytes_.get("up", 0.0), bytes_.get("down", 0.0))
        rows.append((cell.label, len(cell.run.rounds), *both, whole, *shares))
    return Table.of(
        (
            Column("run"),
            Column("rounds", "count"),
            Column("up", "size"),
            Column("down", "size"),
            Column("time", "seconds"),
            *(Column(name, "share") for name in names),
        ),
        rows,
    )


def _bytes_of(cell: Cell, place: int) -> Mapping[str, float]:
    moved = cell.run.rounds[place].bytes
    return {"up": float(moved.up), "down": float(moved.down)}


def _seconds_of(cell: Cell, place: int) -> Mapping[str, float]:
    return cell.run.rounds[place].seconds


def _total(cell: Cell, read: _Read) -> dict[str, float]:
    found: dict[str, float] = {}
    for place in range(len(cell.run.rounds)):
        for name, value in read(cell, place).items():
            found[name] = found.get(name, 0.0) + value
    return found


def _phases(cells: Sequence[Cell]) -> list[str]:
    found = dict.fromkeys(name for cell in cells for r in cell.run.rounds for name in r.seconds)
    return [*(x for x in PHASES if x in found), *(x for x in found if x not in PHASES)]


def _ordered(names: Sequence[str]) -> list[str]:
    order = {name: place for place, name in enumerate((*PHASES, "up", "down"))}
    return sorted(dict.fromkeys(names), key=lambda name: order.get(name, len(order)))


def _by_round(cell: Cell, read: _Read, name: str, title: str, unit: str, divisor: float) -> Chart:
    """Stacked bars, one a round; of long runs, one a group of rounds."""
    count = len(cell.run.rounds)
    step = -(-count // _MOST_ROUNDS)
    by = [read(cell, place) for place in range(count)]
    kinds = _ordered([kind for found in by for kind in found])
    starts = list(range(0, count, step))
    heights = {
        kind: np.array([sum(x.get(kind, 0.0) for x in by[i : i + step]) for i in starts]) / divisor
        for kind in kinds
    }
    form: Form = "size" if unit == "MB" else "seconds"

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        bottom = np.zeros(len(starts))
        handles = []
        for place, values in enumerate(heights.values()):
            bars = axes.bar(
                [i + 1 for i in starts],
                values,
                0.8 * step,
                bottom,
                color=SERIES[place % len(SERIES)],
            )
            handles.append(bars[0])
            bottom += values
        axes.set(xlabel="round", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # type: ignore[call-arg]
        axes.grid(visible=False, axis="x")
        legend_below(figure, handles, [label(kind) for kind in kinds])

    grouped = f" Each bar is {step} rounds." if step > 1 else ""
    return draw(
        name,
        title,
        f"Stacked bars, one a round, by {'direction' if unit == 'MB' else 'phase'}; over all "
        f"clients of the round.{grouped}",
        Table.of(
            [Column("round", "count"), *(Column(kind, form) for kind in kinds)],
            [(i + 1, *(found.get(kind) for kind in kinds)) for i, found in enumerate(by)],
        ),
        paint,
        height=2.4 + legend_height(kinds),
    )


def _by_run(
    cells: Sequence[Cell], read: _Read, name: str, title: str, unit: str, divisor: float
) -> Chart:
    """Lying stacked bars, one a run, of all its rounds."""
    totals = [_total(cell, read) for cell in cells]
    kinds = _ordered([kind for found in totals for kind in found])
    form: Form = "size" if unit == "MB" else "seconds"

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        left = np.zeros(len(cells))
        handles = []
        for place, kind in enumerate(kinds):
            values = np.array([found.get(kind, 0.0) for found in totals]) / divisor
            bars = axes.barh(
                range(len(cells)), values, 0.7, left, color=SERIES[place % len(SERIES)]
            )
            handles.append(bars[0])
            left += values
        axes.set_yticks(range(len(cells)), [label(cell.label, 28) for cell in cells], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel(f"{unit}, all rounds")
        axes.grid(visible=False, axis="y")
        legend_below(figure, handles, [label(kind) for kind in kinds])

    return draw(
        name,
        title,
        f"Lying bars, one a run, stacked by {'direction' if unit == 'MB' else 'phase'}: the sum "
        "over all finished rounds.",
        Table.of(
            [Column("run"), *(Column(kind, form) for kind in kinds)],
            [
                (cell.label, *(found.get(kind) for kind in kinds))
                for cell, found in zip(cells, totals, strict=True)
            ],
        ),
        paint,
        height=0.9 + 0.24 * len(cells) + legend_height(kinds),
    )
