"""Heat maps: rows by columns of shares, in colours that say the same in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from fedexlora.report.chart import label
from fedexlora.report.run_records import Numbers

_MAP = "viridis"
_WRITTEN = 130
"""Cells of a map that still have their numbers in them."""
_TICKS = 16


@dataclass(frozen=True, slots=True)
class Grid:
    """One map: values between 0 and what is the largest of all maps beside it."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Numbers
    """``(rows, columns)``; not a number where there is none."""


def top_of(grids: Sequence[Grid]) -> float:
    """The largest value of several maps, which share their colours."""
    values = np.concatenate([grid.values.ravel() for grid in grids]) if grids else np.zeros(0)
    finite = values[np.isfinite(values)]
    return max(float(finite.max()), 1e-12) if len(finite) else 1e-12


def paint_grid(axes: Axes, grid: Grid, top: float, *, written: bool = True) -> AxesImage:
    """Draw a map, with its numbers in per cent where they have room.

    Args:
        axes: empty ones.
        grid: the map.
        top: the value of the brightest colour.
        written: whether numbers are drawn at all.
    """
    image = axes.imshow(grid.values, aspect="auto", cmap=_MAP, vmin=0.0, vmax=top)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9)
    axes.set_title(label(grid.title, 40), fontsize=9)
    _ticks(axes, grid)
    if written and grid.values.size <= _WRITTEN:
        for (row, column), value in np.ndenumerate(grid.values):
            if np.isfinite(value):
                ink = _ink(value / top)
                text = f"{100 * value:.0f}" if top >= 0.05 else f"{100 * value:.2g}"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
    return image


def paint_grids(figure: Figure, grids: Sequence[Grid], columns: int, bar: str) -> None:
    """Draw maps side by side, with one scale for all.

    Args:
        figure: an empty one.
        grids: at least one.
        columns: how many stand in a row.
        bar: what the scale is of.
    """
    across = min(columns, len(grids))
    down = -(-len(grids) // across)
    axes = figure.subplots(down, across, squeeze=False)
    top = top_of(grids)
    image = None
    for place, each in enumerate(axes.flat):
        if place >= len(grids):
            each.set_visible(False)
            continue
        image = paint_grid(each, grids[place], top, written=across <= 2)
        same = grids[place].rows == grids[place - 1].rows if place else False
        if across > 2 and same and place % across:
            each.set_yticks([])
        below = grids[place + across : place + across + 1]
        if across > 2 and below and below[0].columns == grids[place].columns:
            each.set_xticks([])
    if image is not None:
        scale = figure.colorbar(
            image, ax=axes, location="bottom", aspect=40, format=lambda x, _: f"{100 * x:.3g}"
        )
        scale.set_label(bar, fontsize=9)
        scale.outline.set_visible(False)
        scale.ax.tick_params(labelsize=9)


def _ticks(axes: Axes, grid: Grid) -> None:
    for axis, names in ((axes.xaxis, grid.columns), (axes.yaxis, grid.rows)):
        step = -(-len(names) // _TICKS)
        places = range(0, len(names), step)
        axis.set_ticks(list(places), [label(names[i], 24) for i in places])
    if max(map(len, grid.columns), default=0) > 40 // max(len(grid.columns), 1):
        axes.tick_params(axis="x", rotation=35)
        for text in axes.get_xticklabels():
            text.set_horizontalalignment("right")
            text.set_rotation_mode("anchor")


def _ink(place: float) -> str:
    """Black or white, whichever is the clearer on a colour of the map: at least 4.5 to 1.

    Neither is quite, because no scheme of the reader's may take its place.
    """
    red, green, blue, _ = matplotlib.colormaps[_MAP](place)
    light = 0.2126 * _linear(red) + 0.7152 * _linear(green) + 0.0722 * _linear(blue)
    return "#000001" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "#fffffe"


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else float(((part + 0.055) / 1.055) ** 2.4)
