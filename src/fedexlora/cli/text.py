"""What other people wrote, as it may be printed."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape


def make_console(*, stderr: bool = False) -> Console:
    """Where a command prints to; nothing in a text is coloured or replaced by itself."""
    return Console(stderr=stderr, highlight=False, emoji=False)


def printable(text: object) -> str:
    r"""Text whose control characters a terminal shows instead of obeying them; lines are kept.

    >>> printable("site\x1b[2J")
    'site\\x1b[2J'
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def plain(text: object) -> str:
    r"""The same as rich's markup, which shows its brackets.

    >>> plain("site[red]")
    'site\\[red]'
    """
    return escape(printable(text))
