"""The two choices that make a method: the next adapter, and what happens to the remainder.

Any next adapter ``(A', B')`` is exact if the remainder ``M - B' A'`` of the ideal mean product
``M`` goes to the frozen weight (arXiv:2410.09432, Sec. 3.2 and Table 4).
"""

from __future__ import annotations

from collections.abc import Callable

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.algebra.moments import Moments

Assignment = Callable[[Moments], tuple[Factors, LowRank]]
"""Moments to the next adapter, float64, and the remainder ``M - B' A'``, ``(d_out, d_in)``."""

RemainderRule = Callable[[LowRank], LowRank]
"""The remainder of an assignment to the part of it that the frozen weight receives."""


def mean(moments: Moments) -> tuple[Factors, LowRank]:
    """The mean factors; their remainder is the residual ``R`` (arXiv:2410.09432, eq. 9-12)."""
    return moments.mean, moments.residual()


def keep(remainder: LowRank) -> LowRank:
    """All of the remainder: the aggregation is exact."""
    return remainder


def drop(remainder: LowRank) -> LowRank:
    """None of the remainder: exact only where it is zero anyway."""
    return LowRank.zeros(*remainder.shape, remainder.value.dtype)
