"""Texts that come from outside, made fit for a terminal, a log and a record: escaped, cut, counted.

Whoever sends a text must not move a cursor, turn the direction of a line, pretend to be another
line, or fill a disk.
"""

from __future__ import annotations

from collections.abc import Iterable

FEW = 5
"""How many faults of somebody else's message are listed; the others are counted."""
_LINE = 400
"""Characters of a text that somebody else sent."""
_LONG = 10_000
"""Characters of a text of the user's own machine."""
_ELLIPSIS = " ..."


def cut(text: str, most: int) -> str:
    """``text`` with at most ``most`` characters, three dots among them.

    >>> cut("abcdefghij", 8)
    'abcd ...'
    """
    return text if len(text) <= most else text[: most - len(_ELLIPSIS)] + _ELLIPSIS


def printable(text: str, most: int = _LONG) -> str:
    r"""``text`` of the user's own machine: letters of every language and line ends stay.

    Control characters, those that turn the direction of text, separators of lines that are no line
    ends, and what no encoding can write are escaped.

    >>> printable("größe\n\x1b[2J", 40)
    'größe\n\\x1b[2J'
    """
    shown = "".join(c if c.isprintable() or c == "\n" else _escape(c) for c in text[: most + 1])
    return cut(shown, most)


def outside(text: str, most: int = _LINE) -> str:
    r"""``text`` that came over a wire, on one line: everything but printable ASCII is escaped.

    >>> outside("A/layer\n\u202e\x1b[31m")
    'A/layer\\n\\u202e\\x1b[31m'
    """
    shown = "".join(c if " " <= c <= "~" else _escape(c) for c in text[: most + 1])
    return cut(shown, most)


def few(texts: Iterable[str], most: int = FEW) -> tuple[str, ...]:
    """The first of many texts, and how many more there are; a list that was cut stays as it is.

    >>> few(["a", "b", "c", "d"], 2)
    ('a', 'b', 'and 2 more')
    """
    found = tuple(texts)
    if len(found) <= most + 1:
        return found
    return (*found[:most], f"and {len(found) - most} more")


def size(count: float) -> str:
    """Bytes for people.

    >>> size(12), size(1_234_567)
    ('12 B', '1.2 MB')
    """
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
