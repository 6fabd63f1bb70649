"""Names that somebody else chose, as they may stand in Markdown and in a block of Python code."""

from __future__ import annotations

import re


def code_span(text: str) -> str:
    """A name in a code span, where Markdown obeys nothing that is in it.

    >>> code_span("glue `cola` <b>")
    '`` glue `cola` <b> ``'
    """
    shown = one_line(text) or "(empty)"
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest or shown.startswith(" ") or shown.endswith(" ") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def literal(text: str) -> str:
    r"""A string literal of Python, on one line and without what cannot be seen.

    >>> literal('a "b"'), literal("site\u202e")
    ('"a \\"b\\""', "'site\\u202e'")
    """
    if not text.isprintable():
        return repr(text)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def one_line(text: str) -> str:
    """``text`` with everything escaped that is not printable, line ends included."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
