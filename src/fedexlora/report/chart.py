"""Figures as SVG with their text as text, in colours that a page may set for light and dark.

A figure is drawn in the colours of the light palette. As a file it keeps them; within a page each
one is a CSS variable, so that the same figure follows the reader's scheme and prints on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from fedexlora.errors import InputError
from fedexlora.report.svg import INK, smaller, view_box
from fedexlora.report.tables import Table
from fedexlora.texts import cut, printable

LIGHT = {
    "ink": INK,
    "soft": "#57606a",
    "grid": "#d5d9de",
    "page": "#ffffff",
    "c1": "#0b62c4",
    "c2": "#b85300",
    "c3": "#1a7f45",
    "c4": "#8247c8",
    "c5": "#c8253a",
    "c6": "#0b7a84",
    "c7": "#7a5a2b",
    "c8": "#b8368c",
    "c9": "#5b6470",
    "c10": "#667a00",
}
"""By name, the colours of figures on white; series have the names c1, c2, ..."""
DARK = {
    "ink": "#e6eaef",
    "soft": "#a3adb8",
    "grid": "#39424d",
    "page": "#12161b",
    "c1": "#6cb0ff",
    "c2": "#f5a25d",
    "c3": "#5fd08c",
    "c4": "#c09bff",
    "c5": "#ff8592",
    "c6": "#4fd0d9",
    "c7": "#cdab75",
    "c8": "#f48fcb",
    "c9": "#a8b3bf",
    "c10": "#c0cf5a",
}
SERIES = tuple(LIGHT[f"c{i}"] for i in range(1, 11))
MARKERS = "os^DvPX*<>"
DASHES = ("-", "--", ":", "-.")
WIDTH = 4.7
"""Inches of a figure, so that text of 10 points is as large on a phone."""
FORMATS = (".png", ".svg", ".pdf")
_LONGEST = 60
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": LIGHT["soft"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"],
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "image.interpolation": "none",
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure, what it shows in words, and its numbers."""

    name: str
    """Of its files; letters, digits and hyphens."""
    title: str
    description: str
    svg: str
    """In the colours of the light palette."""
    table: Table

    def inline(self) -> str:
        """The figure within a page, whose style sheet sets the variables."""
        names = {colour: name for name, colour in LIGHT.items()}
        found = re.compile("|".join(names))
        return found.sub(lambda match: f"var(--{names[match[0]]})", self.svg)

    def to_svg(self) -> str:
        """The figure as a file of its own, on white."""
        ground = f'<rect width="100%" height="100%" fill="{LIGHT["page"]}"/>'
        head, rest = self.svg.split("</desc>", 1)
        return f'<?xml version="1.0" encoding="utf-8"?>\n{head}</desc>{ground}{rest}\n'


def series(place: int) -> dict[str, Any]:
    """Colour, marker and dash of a line: no two of the first forty are alike."""
    dash = DASHES[place // len(SERIES) % len(DASHES)]
    count = len(SERIES)
    return {"color": SERIES[place % count], "marker": MARKERS[place % count], "linestyle": dash}


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure in the report's style, for as long as the block draws in it."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure


def draw(
    name: str,
    title: str,
    description: str,
    table: Table,
    paint: Callable[[Figure], None],
    *,
    height: float = 2.9,
) -> Chart:
    """Make a figure.

    Args:
        name: of its files.
        title: above it.
        description: what it shows, for whoever does not see it.
        table: its numbers.
        paint: draws into an empty figure.
        height: in inches.
    """
    with new_figure(WIDTH, height) as figure:
        paint(figure)
        svg = _svg(figure, name)
    named, described = escape(printable(title)), escape(printable(description))
    texts = f"<title>{named}</title><desc>{described}</desc>"
    box = view_box(svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="{box}" font-family="sans-serif" font-size="10" fill="{LIGHT["ink"]}" '
        f'role="img" aria-label="{named}">'
    )
    return Chart(name, title, description, f"{head}{texts}{body}", table)


def save_picture(path: Path, width: float, height: float, paint: Callable[[Figure], None]) -> None:
    """Draw a figure into a file, on white.

    Args:
        path: ``.png``, ``.svg`` or ``.pdf``; replaced if it exists.
        width: in inches.
        height: in inches.
        paint: draws into an empty figure.

    Raises:
        InputError: if it cannot be written.
    """
    with new_figure(width, height) as figure:
        paint(figure)
        _as_written(figure)
        try:
            figure.savefig(path, dpi=160, facecolor=LIGHT["page"])
        except OSError as error:
            raise InputError(f"--plot {path} cannot be written: {error.strerror}") from error


def check_format(path: Path) -> None:
    """Refuse a picture of a kind that cannot be drawn.

    Raises:
        InputError: naming the kinds that can.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--plot {path}: expected a name that ends with {', '.join(FORMATS)}")


def label(text: str, most: int = _LONGEST) -> str:
    """Somebody else's name in a figure, on one line and not too long."""
    return cut(printable(text).replace("\n", " "), most)


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend under the figure, in as many columns as fit."""
    longest = max(map(len, labels), default=0)
    columns = max(1, min(4, int(62 // (longest + 6)), len(labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.6)


def legend_height(labels: Sequence[str]) -> float:
    """The inches that such a legend takes."""
    longest = max(map(len, labels), default=0)
    columns = max(1, min(4, int(62 // (longest + 6)), len(labels) or 1))
    return 0.12 + 0.19 * -(-len(labels) // columns)


def _as_written(figure: Figure) -> None:
    """A name is somebody else's, and a $ in it begins no formula; grids need no clipping."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    for axes in figure.axes:
        for line in (*axes.get_xgridlines(), *axes.get_ygridlines()):
            line.set_clip_on(False)  # they end where the axes do


def _svg(figure: Figure, name: str) -> str:
    _as_written(figure)
    out = io.StringIO()
    # Two figures of a page must not share the ids of their clip paths.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.id": name}):
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=empty)
    return smaller(out.getvalue())
