r"""Where a generated text states its answer: in a box, after ``####``, or after "the answer is"."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$]+)")
_PHRASE = re.compile(r"\banswer\s*(?:is\b|:|=)[\s:]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` or ``\fbox{...}`` holds; None if there is none.

    Braces may be nested; escaped ones do not count. A box that the text's end cuts off is not
    complete. ``\boxed 5`` is read too, if there is no box with braces.
    """
    for start in reversed([found.end() for found in _BOX.finditer(text)]):
        end = _closing_brace(text, start)
        if end is not None:
            return text[start:end].strip()
    bare = _BARE_BOX.findall(text)
    return str(bare[-1]) if bare else None


def hashed(text: str) -> str | None:
    """The line after the last ``####``; None if there is no such mark."""
    _, mark, rest = text.rpartition("####")
    return _first_line(rest) if mark else None


def stated(text: str) -> str | None:
    """The line after the last "answer is", "answer:" or "answer ="; None if there is none."""
    found = list(_PHRASE.finditer(text))
    return _first_line(text[found[-1].end() :]) if found else None


def sentence(line: str) -> str:
    """A line up to its first full stop, question or exclamation mark that ends a sentence."""
    return _SENTENCE_END.split(line, maxsplit=1)[0]


def _first_line(text: str) -> str:
    return text.lstrip().partition("\n")[0].strip()


def _closing_brace(text: str, start: int) -> int | None:
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 1  # the next character is escaped
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return None
