"""Lines by round, arm by arm: the mean over seeds, and each seed beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor, log10
from statistics import mean

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from fedexlora.report.chart import Chart, draw, label, legend_below, legend_height, series
from fedexlora.report.run_set import Cell, RunSet
from fedexlora.report.tables import Column, Form, Table

SINGLE = 12
"""Runs whose single lines are still told apart; of more, means alone are drawn."""
_MARKED = 30
"""Points of a line that are still marked."""
Curve = Mapping[float, float]
"""By round, or whatever stands on the horizontal axis, a value."""


def curves(runs: RunSet, read: Callable[[Cell], Curve]) -> dict[str, list[tuple[Cell, Curve]]]:
    """By arm, every cell that has a curve."""
    found = {
        arm: [(cell, curve) for cell in cells if (curve := read(cell))]
        for arm, cells in runs.arms.items()
    }
    return {arm: pairs for arm, pairs in found.items() if pairs}


def plot_arms(
    axes: Axes, runs: RunSet, found: Mapping[str, Sequence[tuple[Cell, Curve]]]
) -> tuple[list[Artist], list[str]]:
    """Draw every arm's mean, and its seeds faintly where there are several.

    Returns:
        What a legend needs: lines and names.
    """
    handles: list[Artist] = []
    for pairs in found.values():
        style = series(runs.place(pairs[0][0]))
        if len(pairs) > 1 and len(runs.cells) <= SINGLE:
            for _, curve in pairs:
                axes.plot(
                    list(curve), list(curve.values()), color=style["color"], lw=0.8, alpha=0.4
                )
        across, up = mean_curve([curve for _, curve in pairs])
        if len(across) > _MARKED:
            style = {**style, "marker": None}
        handles += axes.plot(across, up, **style)
    return handles, [label(arm) for arm in found]


def mean_curve(found: Sequence[Curve]) -> tuple[list[float], list[float]]:
    """The mean of curves where all of them have a value.

    Curves of as many values whose places differ a little, as bytes by seed do, are taken place by
    place.

    >>> mean_curve([{0: 1.0, 1: 2.0}, {0: 3.0, 1: 4.0, 2: 9.0}])
    ([0, 1], [2.0, 3.0])
    >>> mean_curve([{0.0: 1.0, 1.5: 2.0}, {0.0: 3.0, 2.5: 4.0}])
    ([0.0, 2.0], [2.0, 3.0])
    """
    if len({len(curve) for curve in found}) == 1 and len(set(map(tuple, found))) > 1:
        across = [mean(places) for places in zip(*found, strict=True)]
        up = zip(*(curve.values() for curve in found), strict=True)
        return across, [mean(values) for values in up]
    shared = [x for x in found[0] if all(x in curve for curve in found)]
    return shared, [mean(curve[x] for curve in found) for x in shared]


def line_chart(
    runs: RunSet,
    read: Callable[[Cell], Curve],
    *,
    name: str,
    title: str,
    description: str,
    form: Form,
    across: str = "round",
    up: str = "",
    logarithmic: bool = False,
) -> Chart | None:
    """One value of every run by round; None where no run has it.

    Args:
        runs: of the report.
        read: a cell's curve.
        name: of the figure's files.
        title: above it.
        description: for whoever does not see it.
        form: of the values in the table.
        across: what stands on the horizontal axis.
        up: what stands on the vertical axis.
        logarithmic: whether the vertical axis is; what is not above 0 is not drawn then.
    """
    found = curves(runs, read)
    if not found:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        drawn = {arm: [(c, _positive(x) if logarithmic else x) for c, x in pairs]
                 for arm, pairs in found.items()}  # fmt: skip
        if logarithmic:
            axes.set_yscale("log")
        handles, labels = plot_arms(axes, runs, drawn)
        finish_axes(axes, across, up, logarithmic=logarithmic)
        if len(runs.arms) > 1:
            legend_below(figure, handles, labels)

    extra = legend_height([label(arm) for arm in found]) if len(runs.arms) > 1 else 0.0
    return draw(
        name, title, description, curve_table(found, across, form), paint, height=2.6 + extra
    )


def finish_axes(axes: Axes, across: str, up: str, *, logarithmic: bool = False) -> None:
    """Names of the axes; rounds are whole numbers, and shares are per cent."""
    axes.set(xlabel=across, ylabel=up)
    low, high = axes.get_ylim()
    if logarithmic:
        decades = floor(log10(low)), max(ceil(log10(high)), floor(log10(low)) + 1)
        axes.set_ylim(10.0 ** decades[0], 10.0 ** decades[1])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif up.startswith("%"):
        axes.set_ylim(0.0, 1.06 * high if high > 0.0 else 1.0)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}")
    if "round" in across or "epoch" in across:
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # type: ignore[call-arg]


def curve_table(
    found: Mapping[str, Sequence[tuple[Cell, Curve]]], across: str, form: Form
) -> Table:
    """A row for every place on the horizontal axis, and a column for every cell."""
    pairs = [pair for pairs in found.values() for pair in pairs]
    places = sorted({x for _, curve in pairs for x in curve})
    head = Column(across, "count" if all(float(x).is_integer() for x in places) else "number")
    columns = [head, *(Column(cell.label, form) for cell, _ in pairs)]
    return Table.of(columns, [(x, *(curve.get(x) for _, curve in pairs)) for x in places])


def _positive(curve: Curve) -> Curve:
    return {x: y for x, y in curve.items() if y > 0.0}
