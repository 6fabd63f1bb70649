"""What other people wrote, as rich may print it."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from fedexlora.texts import printable


def make_console(*, stderr: bool = False) -> Console:
    """Where a command prints to; nothing in a text is coloured or replaced by itself."""
    return Console(stderr=stderr, highlight=False, emoji=False)


def plain(text: object) -> str:
    r"""Text without power over the terminal, as rich's markup, which shows its brackets.

    >>> plain("site[red]\x1b[2J")
    'site\\[red]\\x1b[2J'
    """
    return escape(printable(str(text)))
