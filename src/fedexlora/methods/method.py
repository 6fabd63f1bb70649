"""What a method is: which factors clients train, and the two choices of ``algebra.assignment``."""

from __future__ import annotations

from dataclasses import dataclass

from fedexlora.algebra.assignment import Assignment, RemainderRule
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.algebra.moments import Moments


@dataclass(frozen=True, slots=True)
class Aggregate:
    """One module after aggregation."""

    adapter: Factors
    """The adapter that every client continues from, float32."""
    remainder: LowRank
    """What is added to the frozen weight, ``(d_out, d_in)``, unscaled, float32."""


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
    remainder: RemainderRule

    def aggregate(self, moments: Moments) -> Aggregate:
        """One module's next adapter and the remainder for its frozen weight."""
        adapter, remainder = self.assignment(moments)
        dtype = moments.comoment.value.dtype
        return Aggregate(adapter.to(dtype), self.remainder(remainder))
