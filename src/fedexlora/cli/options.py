"""What several commands share: lists of numbers, progress over modules, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedexlora.cli.text import make_console
from fedexlora.errors import InputError


def numbers(option: str, text: str | None) -> list[float] | None:
    """Numbers with commas between them.

    Raises:
        InputError: naming what is not a number.
    """
    if text is None:
        return None
    found, faults = [], []
    for word in text.split(","):
        try:
            found.append(float(word))
        except ValueError:
            faults.append(f"{word!r} is not a number")
    if faults:
        raise InputError(f"{option}: expected numbers with commas between them", faults)
    return found


def progress_bars(console: Console) -> Progress:
    """Bars that are gone at the end; nothing where ``console`` is no terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=min(30, console.width // 4)),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


@contextmanager
def progress_over(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, gone at the end; nothing where that is no terminal."""
    bar = progress_bars(make_console(stderr=True))
    task = bar.add_task(what, total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)
