"""What other people wrote, as rich may print it."""

from __future__ import annotations

from rich.markup import escape

from fedexlora.texts import printable


def plain(text: object) -> str:
    r"""Text without power over the terminal, as rich's markup, which shows its brackets.

    >>> plain("site[red]\x1b[2J")
    'site\\[red]\\x1b[2J'
    """
    return escape(printable(str(text)))
