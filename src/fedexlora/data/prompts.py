"""What a model reads before it writes, each prompt once, and what stands around its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AnswerFrame:
    """What a chat template writes around an answer, and a model that has learned it as well."""

    openings: tuple[str, ...] = ()
    """Texts before an answer that are none of the prompt, such as an empty block of reasoning."""
    ends: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer, where a template has no token for that."""

    def answer(self, text: str) -> str:
        """A text without the opening that it begins with, if it begins with one."""
        bare = text.lstrip()
        for opening in self.openings:
            if bare.startswith(opening):
                return bare[len(opening) :].lstrip()
        return text

    def opens(self, text: str) -> bool:
        """Whether a text is no more than the beginning of an opening."""
        return any(opening.startswith(text.lstrip()) for opening in self.openings)


NO_FRAME = AnswerFrame()
"""Nothing: an answer begins after its prompt, and ends with the end token."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a data set's rows; rows with equal ones have one between them."""

    tokens: Sequence[Sequence[int]]
    """Token ids of each distinct prompt, in the order of their first rows."""
    of_row: Sequence[int]
    """By row, which prompt it has."""
    answers: Sequence[str]
    """By row, the answer that it has itself: its reference, if no column of them is named."""
    frame: AnswerFrame = NO_FRAME
    notes: Sequence[str] = ()
    """What is odd about them, and yet no fault."""


def distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different ones among texts, and for each text the number of its own.

    >>> distinct(["b", "a", "b"])
    (['b', 'a'], [0, 1, 0])
    """
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(numbers), [numbers[text] for text in texts]


def cut_beginnings(
    prompts: Sequence[Sequence[int]], begin: Sequence[int], max_length: int
) -> tuple[list[list[int]], list[str]]:
    """Prompts without the beginning of those that are too long.

    Args:
        prompts: the token ids of each, without those of ``begin``.
        begin: the tokens that every prompt begins with, and keeps.
        max_length: most tokens of a prompt, ``begin`` among them.

    Returns:
        The token ids of each, with ``begin``; and a note if any is shorter than it was.
    """
    room = max_length - len(begin)
    kept = [[*begin, *tokens[max(0, len(tokens) - room) :]] for tokens in prompts]
    cut = sum(len(tokens) > room for tokens in prompts)
    said = f"{cut} of {len(prompts)} prompts lose their beginning to task.max_length, {max_length}"
    return kept, [said] if cut else []
