"""What a method is: which factors clients train, and the two choices of ``algebra.assignment``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedexlora.algebra.assignment import Assignment, RemainderRule

Stored = Literal["products", "factors", "none"]
"""What a method makes of adapters that are stored: the mean of their products, the product of their
mean factors, or nothing, because it needs more than finished adapters."""


@dataclass(frozen=True, slots=True)
class Method:
    """One published way to aggregate LoRA adapters."""

    name: str
    title: str
    paper: str
    """Where it is published."""
    sends: str
    """What a client uploads and downloads, for people."""
    keeps: str
    """What becomes of the difference to the ideal, for people."""
    exact: bool
    """Whether the aggregate is the ideal mean product; if so, every round is held to it."""
    trained: tuple[str, ...]
    """The factors that clients train and upload: ``("A", "B")`` or ``("B",)``."""
    assignment: Assignment
    """The next adapter."""
    remainder: RemainderRule
    stored: Stored
    """What ``aggregate`` makes of stored adapters; no method has a default."""
    own_adapters: bool = False
    """Whether every client continues from the factors that it trained itself."""
    truncates: bool = False
    """Whether a stated part of the remainder is left out: the record then bounds the error."""

    @property
    def certified(self) -> bool:
        """Whether a round whose error is larger than what is stated stops the run."""
        return self.exact or self.truncates
