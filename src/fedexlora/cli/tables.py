"""Tables that are whole at any width: what does not fit moves below or onto the next line."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

LABEL = 12
_UNLIMITED = 100_000


def print_blocks(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A table of numbers; columns that do not fit beside the first one follow in further blocks.

    Args:
        console: where to, and how wide that is.
        title: above it.
        header: the columns' names; the first column is repeated in every block.
        rows: a cell for each column, as plain text.
    """
    blocks: list[list[int]] = [[0]]
    for column in range(1, len(header)):
        tried = [*blocks[-1], column]
        if len(tried) > 2 and width(console, _numbers(header, rows, tried)) > console.width:
            tried = [0, column]
            blocks.append(tried)
        blocks[-1] = tried
    tables = [_numbers(header, rows, block) for block in blocks]
    console.print(Group(Text(title, style="italic"), *tables))


def width(console: Console, table: Table) -> int:
    """How wide a table is if nothing limits it."""
    unlimited = console.options.update(max_width=_UNLIMITED)
    return Measurement.get(console, unlimited, table).maximum


def folding_table(*header: str) -> Table:
    """An empty table of texts, whose longest words go on in the next line of their cell."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in header:
        table.add_column(Text(name), overflow="fold")
    return table


def print_entry(console: Console, label: str, text: str) -> None:
    """A label and its text, in rich's markup; lines that follow are below the text."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(min_width=LABEL)
    grid.add_column(overflow="fold")
    grid.add_row(label, text)
    console.print(grid)


def _numbers(header: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in columns:
        table.add_column(Text(header[column]), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[column]) for column in columns))
    return table
