"""A heat map of what averaging the factors of adapters loses: layers by projections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fedexlora.exchange.adapter_records import DeviationRecord
from fedexlora.report.chart import check_format, save_picture
from fedexlora.report.heat import Grid, paint_grids


def draw_deviation(record: DeviationRecord, path: Path) -> None:
    """Draw the deviation of every module, one row a layer and one column a projection.

    Args:
        record: what :func:`fedexlora.deviation` returns.
        path: ``.png``, ``.svg`` or ``.pdf``; replaced if it exists.

    Raises:
        InputError: if the picture cannot be written.
    """
    check_format(path)
    layers = tuple(dict.fromkeys(m.layer for m in record.modules))
    projections = tuple(dict.fromkeys(m.projection for m in record.modules))
    values = np.full((len(layers), len(projections)), np.nan)
    for module in record.modules:
        place = layers.index(module.layer), projections.index(module.projection)
        values[place] = module.deviation
    grid = Grid("", tuple(name or "(no layer)" for name in layers), projections, values)

    def paint(figure: Figure) -> None:
        paint_grids(figure, [grid], 1, "% of the module's mean update")
        figure.suptitle(
            f"What averaging the factors loses: {record.deviation:.1%} of the mean update, "
            f"{len(record.sources)} adapters",
            fontsize=9,
        )

    height = 2.1 + 0.3 * len(layers)
    save_picture(path, 2.6 + 0.95 * len(projections), height, paint)
