"""The report as one HTML file, and its figures as files of their own.

Everything in records is somebody else's text: the templates escape it, and the page carries a
policy under which a browser would neither run a script of it nor ask anyone for anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedexlora import __version__
from fedexlora.errors import InputError
from fedexlora.exchange.files import replace_bytes
from fedexlora.report.blocks import Code, Figures, Rows, Section
from fedexlora.report.chart import DARK, LIGHT, Chart
from fedexlora.report.run_set import RunSet, read_runs
from fedexlora.report.sections import facts, report_command, sections, title
from fedexlora.report.tables import Table
from fedexlora.texts import printable

LARGEST = 300_000
"""Bytes of a page."""
_LONGEST = 1_000_000
"""Letters of one text, such as a recipe."""
_ROWS = ((400, 400), (120, 400), (40, 120), (20, 90), (10, 60), (5, 40), (3, 30), (3, 6))
"""Rows of a figure's table and of one that stands alone, as many as leave the page small enough;
files have them all."""


def write_report(folders: Sequence[Path], out: Path, figures: Path | None = None) -> None:
    """Write the report of a run, of several, or of a comparison.

    Args:
        folders: of runs, or the one of a comparison.
        out: the HTML file; replaced if it exists.
        figures: a folder for every figure as SVG and CSV; none are written if not given.

    Raises:
        InputError: if a folder cannot be read, or a file cannot be written; lists all faults.
    """
    runs = read_runs(folders)
    made = sections(runs)
    again = Code("This report", report_command(folders, out))
    made[-1] = Section(made[-1].name, made[-1].title, (*made[-1].blocks, again))
    page = render(runs, made)
    try:
        if figures is not None:
            _write_figures(figures, made)
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(out, page.encode())
    except OSError as error:
        raise InputError(f"{error.filename or out} cannot be written: {error.strerror}") from error


def render(runs: RunSet, made: Sequence[Section]) -> str:
    """The page, with as many rows in its tables as it has room for."""
    template = _templates().get_template("report.html.jinja")
    for most_of_figure, most in _ROWS:
        page = template.render(
            title=title(runs),
            facts=facts(runs),
            sections=made,
            light=LIGHT,
            dark=DARK,
            version=__version__,
            most=most,
            most_of_figure=most_of_figure,
            inline=_inline,
        )
        if len(page.encode()) < LARGEST:
            break
    return page


def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("fedexlora.report"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: object) -> object:
    """A text without what turns its direction or hides in it; markup is made here."""
    return printable(value, _LONGEST) if type(value) is str else value


def _inline(chart: Chart) -> Markup:
    """A figure's own markup, in which matplotlib and :func:`draw` have escaped every text."""
    return Markup(chart.inline())


def _write_figures(folder: Path, made: Sequence[Section]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg, table in _files(made):
        if svg:
            (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
        (folder / f"{name}.csv").write_text(table.to_csv(), encoding="utf-8")


def _files(made: Sequence[Section]) -> Iterator[tuple[str, str, Table]]:
    """Name, SVG and table of every figure, and of every table that stands alone."""
    for section in made:
        for block in section.blocks:
            if isinstance(block, Figures):
                yield from ((c.name, c.to_svg(), c.table) for c in block.charts)
            elif isinstance(block, Rows):
                words = "".join(c if c.isalnum() else "-" for c in block.title.lower())
                yield f"table-{section.name}-{words}", "", block.table
