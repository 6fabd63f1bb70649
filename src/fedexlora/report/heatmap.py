"""A heat map of what averaging loses: layers by projections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedexlora.errors import InputError
from fedexlora.exchange.adapter_records import DeviationModuleRecord, DeviationRecord

FORMATS = (".png", ".svg", ".pdf")


def check_format(path: Path) -> None:
    """Refuse a picture of a kind that cannot be drawn.

    Raises:
        InputError: naming the kinds that can.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--plot {path}: expected a name that ends with {', '.join(FORMATS)}")


def draw_deviation(record: DeviationRecord, path: Path) -> None:
    """Draw the deviation of every module, one row a layer and one column a projection.

    Args:
        record: what :func:`fedexlora.deviation` returns.
        path: ``.png``, ``.svg`` or ``.pdf``; replaced if it exists.

    Raises:
        InputError: if the picture cannot be written.
    """
    check_format(path)
    layers = list(dict.fromkeys(m.layer for m in record.modules))
    projections = list(dict.fromkeys(m.projection for m in record.modules))
    figure = Figure(
        figsize=(2.2 + 0.95 * len(projections), 1.9 + 0.3 * len(layers)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = _grid(record.modules, layers, projections)
    top = max(float(np.nanmax(values)), 1e-12)
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=top)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "black" if value > 0.6 * top else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=7)
    axes.set_xticks(range(len(projections)), [_wrapped(x) for x in projections], fontsize=7)
    axes.set_yticks(range(len(layers)), [x or "(no layer)" for x in layers], fontsize=7)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a name is somebody else's, and a $ in it begins no formula
    axes.tick_params(length=0)
    axes.set_title(
        f"What averaging the factors loses: {record.deviation:.1%} of the mean update\n"
        f"{len(record.sources)} adapters",
        fontsize=9,
        loc="left",
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label("% of the module's mean update", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise InputError(f"--plot {path} cannot be written: {error.strerror}") from error


def _grid(
    modules: tuple[DeviationModuleRecord, ...], layers: list[str], projections: list[str]
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Per cent by layer and projection; not a number where there is no such module."""
    values = np.full((len(layers), len(projections)), np.nan)
    for module in modules:
        place = layers.index(module.layer), projections.index(module.projection)
        values[place] = 100.0 * module.deviation
    return values


def _wrapped(projection: str) -> str:
    return projection.replace(".", ".\n")
