"""Templates of prompts and completions: text with columns in it."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import TypeAlias

Part: TypeAlias = tuple[str, str | None]
"""A text, and the placeholder after it if there is one."""


def parse_template(template: str) -> tuple[Part, ...]:
    """A template's texts and placeholders, in order.

    A placeholder is a column's name in braces; a brace of the text itself is written twice.

    >>> parse_template("{{{question}}}?")
    (('{', 'question'), ('}', None), ('?', None))

    Raises:
        ValueError: if a brace is alone, or a placeholder is anything but a name.
    """
    parts: list[Part] = []
    try:
        for text, name, form, conversion in Formatter().parse(template):
            if name is not None and (not name or form or conversion):
                more = f"{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
                raise ValueError(f"{{{more}}} is no column's name")
            parts.append((text, name))
    except ValueError as error:
        raise ValueError(f"{error}; a brace of the text itself is written twice") from None
    return tuple(parts)


def placeholders(template: str) -> tuple[str, ...]:
    """The names of a template's placeholders, each once."""
    return tuple(dict.fromkeys(name for _, name in parse_template(template) if name is not None))


def fill(template: str, columns: Mapping[str, list[str]], count: int) -> list[str]:
    """A batch of texts; what a column holds is never read as a template.

    Args:
        template: the template.
        columns: the values of every placeholder, by its name.
        count: the number of rows.
    """
    parts = parse_template(template)
    return [
        "".join(text if name is None else text + columns[name][row] for text, name in parts)
        for row in range(count)
    ]
