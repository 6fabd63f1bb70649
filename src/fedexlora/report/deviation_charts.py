"""The deviation analysis as figures: of a report's page, and as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedexlora.errors import InputError
from fedexlora.report.chart import (
    Chart,
    check_format,
    draw,
    label,
    legend_below,
    legend_height,
    save_picture,
    series,
)
from fedexlora.report.deviation_curves import (
    PANELS,
    by_epochs,
    by_layer,
    by_module,
    by_projection,
)
from fedexlora.report.heat import Grid, paint_grid, paint_grids, top_of
from fedexlora.report.lines import curves, finish_axes, line_chart, plot_arms
from fedexlora.report.run_set import Cell, RunSet
from fedexlora.report.tables import Column, Table

_MOST = 36
"""Maps of one figure."""
_TITLE = 21
"""Letters above one of three maps."""
_ROUNDS = 24
"""Columns of a map over rounds."""
_BAR = "% of the module's ideal update that averaging the factors loses"


def deviation_charts(runs: RunSet) -> list[Chart]:
    """Everything that the records of the runs have of it."""
    found: list[Chart | None] = [_module_maps(runs), _layer_maps(runs), _projections(runs)]
    found += [
        line_chart(
            runs,
            panel.read,
            name=panel.name,
            title=panel.title,
            description=panel.description,
            form=panel.form,
            up=panel.up,
        )
        for panel in PANELS
    ]
    found.append(_epochs(runs))
    return [chart for chart in found if chart is not None]


def draw_analysis(runs: RunSet, path: Path) -> None:
    """Draw all of it as one picture.

    Args:
        runs: one run or several.
        path: ``.png``, ``.svg`` or ``.pdf``; replaced if it exists.

    Raises:
        InputError: if no run has a finished round, or the picture cannot be written.
    """
    check_format(path)
    drawn = [cell for cell in runs.cells if cell.run.rounds]
    if not drawn:
        raise InputError("--plot: no run has a finished round")
    grids = _first_and_last(drawn[0]) if len(drawn) == 1 else _first_rounds(drawn)[:3]
    grids = [replace(grid, title=f"{grid.title}, round 1" if len(drawn) > 1 else grid.title)
             for grid in grids]  # fmt: skip
    found = [(panel, lines) for panel in PANELS if (lines := curves(runs, panel.read))]
    epochs = by_epochs(runs)
    count = len(grids) + len(found) + bool(epochs)
    down = -(-count // 3)

    def paint(figure: Figure) -> None:
        places = list(figure.subplots(down, 3, squeeze=False).flat)
        for grid in grids:
            paint_grid(places.pop(0), grid, top_of(grids))
        handles: list[Artist] = []
        labels: list[str] = []
        for panel, lines in found:
            axes = places.pop(0)
            drawn_arms = plot_arms(axes, runs, lines)
            if len(drawn_arms[1]) > len(labels):
                handles, labels = drawn_arms
            axes.set_title(panel.title, fontsize=9)
            finish_axes(axes, "round", panel.up)
        if epochs:
            _paint_epochs(places.pop(0), epochs)
        for axes in places:
            axes.set_visible(False)
        if len(runs.arms) > 1:
            legend_below(figure, handles, labels)
        figure.suptitle("What averaging the factors loses, |R| / |M|", fontsize=10)

    rows = max(len(grid.rows) for grid in grids)
    save_picture(path, 12.0, max(2.7 * down, 1.2 + 0.2 * rows) + 0.6, paint)


def _module_maps(runs: RunSet) -> Chart | None:
    drawn = [cell for cell in runs.cells if cell.run.rounds]
    if not drawn:
        return None
    alone = len(drawn) == 1
    grids = _first_and_last(drawn[0]) if alone else _first_rounds(drawn)
    return _maps(
        grids,
        name="deviation-modules",
        title="Deviation by layer and projection",
        description="|R| / |M| of every adapted module, in "
        + ("the first and the last round." if alone else "round 1 of each run."),
    )


def _layer_maps(runs: RunSet) -> Chart | None:
    grids = []
    for cell in runs.cells:
        modules = cell.run.modules
        values = by_layer(modules)
        if values.shape[1] > 1 and np.isfinite(values).any():
            step = -(-values.shape[1] // _ROUNDS)
            rounds = tuple(str(i + 1) for i in range(0, values.shape[1], step))
            grids.append(Grid(cell.label, _layer_names(cell), rounds, values[:, ::step]))
    return _maps(
        grids,
        name="deviation-layers",
        title="Deviation by layer, over rounds",
        description="|R| / |M| over the modules of each layer; a column is a round.",
    )


def _maps(grids: Sequence[Grid], *, name: str, title: str, description: str) -> Chart | None:
    """Maps side by side; None without any."""
    if not grids:
        return None
    shown, key = _titled(grids[:_MOST])
    description += key
    if len(shown) < len(grids):
        description += f" Of {len(grids)} runs the first {_MOST} are drawn; the table has all."
    across = len(shown) if len(shown) <= 2 else 3
    rows, down = max(len(grid.rows) for grid in shown), -(-len(shown) // across)
    each = 0.55 + (0.19 if across <= 2 else 0.1) * rows

    def paint(figure: Figure) -> None:
        paint_grids(figure, shown, across, "% of the ideal update")

    height = 0.85 + down * max(each, 1.1)
    return draw(name, title, description, _grid_table(grids), paint, height=height)


def _titled(grids: Sequence[Grid]) -> tuple[list[Grid], str]:
    """The maps under numbers where their titles have no room, and what the numbers stand for."""
    room = _TITLE if len(grids) > 2 else 2 * _TITLE
    if all(len(grid.title) <= room for grid in grids):
        return list(grids), ""
    numbered = [replace(grid, title=f"({i})") for i, grid in enumerate(grids, 1)]
    key = "; ".join(f"({i}) {grid.title}" for i, grid in enumerate(grids, 1))
    return numbered, f" The maps: {key}."


def _grid_table(grids: Sequence[Grid]) -> Table:
    names = tuple(dict.fromkeys(name for grid in grids for name in grid.columns))
    rows = []
    for grid in grids:
        for row, values in zip(grid.rows, grid.values, strict=True):
            by = dict(zip(grid.columns, map(float, values), strict=True))
            found = (by.get(name, np.nan) for name in names)
            rows.append((grid.title, row, *(x if np.isfinite(x) else None for x in found)))
    return Table.of(
        [Column("map"), Column("layer"), *(Column(name, "share") for name in names)], rows
    )


def _projections(runs: RunSet) -> Chart | None:
    """By projection over rounds, of a run alone: several have a map each."""
    run = runs.alone
    if run is None or len(run.modules.projections) < 2:
        return None
    values = by_projection(run.modules)
    if not np.isfinite(values).any():
        return None
    names = [label(name, 30) for name in run.modules.projections]
    rounds = range(1, values.shape[1] + 1)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        handles: list[Artist] = []
        for place, row in enumerate(values):
            handles += axes.plot(rounds, row, **series(place))
        finish_axes(axes, "round", "% of the ideal update")
        legend_below(figure, handles, names)

    return draw(
        "deviation-projections",
        "Deviation by projection, over rounds",
        "|R| / |M| over all modules of one projection.",
        Table.of(
            [Column("round", "count"), *(Column(x, "share") for x in run.modules.projections)],
            [(number, *map(float, values[:, number - 1])) for number in rounds],
        ),
        paint,
        height=2.6 + legend_height(names),
    )


def _epochs(runs: RunSet) -> Chart | None:
    found = by_epochs(runs)
    if not found:
        return None
    return draw(
        "deviation-epochs",
        "Deviation in round 1, by local epochs",
        "|R| / |M| over all modules in round 1, of runs with different numbers of local epochs; "
        "the mean of all runs of a method with as many.",
        Table.of(
            (
                Column("method"),
                Column("local epochs", "number"),
                Column("mean", "share"),
                Column("runs", "count"),
            ),
            [
                (method, number, float(np.mean(values)), len(values))
                for method, by in found.items()
                for number, values in by.items()
            ],
        ),
        lambda figure: _paint_epochs(figure.add_subplot(), found),
    )


def _paint_epochs(axes: Axes, found: dict[str, dict[float, list[float]]]) -> None:
    for place, (method, by) in enumerate(found.items()):
        means = [float(np.mean(values)) for values in by.values()]
        axes.plot(list(by), means, label=label(method), **series(place))
    axes.set_title("Round 1, by local epochs", fontsize=9)
    finish_axes(axes, "local epochs", "% of the ideal update")
    axes.legend()


def _first_and_last(cell: Cell) -> list[Grid]:
    last = len(cell.run.rounds)
    return [_grid(cell, round_, f"round {round_}") for round_ in dict.fromkeys((1, last))]


def _first_rounds(cells: Sequence[Cell]) -> list[Grid]:
    return [_grid(cell, 1, cell.label) for cell in cells]


def _grid(cell: Cell, round_: int, title: str) -> Grid:
    modules = cell.run.modules
    names = _shortest(modules.projections)
    return Grid(title, _layer_names(cell), names, by_module(modules, round_))


def _layer_names(cell: Cell) -> tuple[str, ...]:
    return tuple(name or "(no layer)" for name in _shortest(cell.run.modules.layers))


def _shortest(names: Sequence[str]) -> tuple[str, ...]:
    """The last parts of dotted names, as many as tell them apart."""
    parts = [name.split(".") for name in names]
    for count in range(1, max(map(len, parts), default=1) + 1):
        short = [".".join(part[-count:]) for part in parts]
        if len(set(short)) == len(set(names)):
            return tuple(short)
    return tuple(names)
