"""The server's momentum of a module, as a matrix: in factors, of a rank that is bounded.

Others keep one momentum for A and one for B, which means nothing once the factors are turned or
split anew. A matrix ``(M, N)`` does not depend on how it is split.
"""

from __future__ import annotations

import torch

from fedexlora.algebra import assignment
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.methods.rule import Memory, ModuleRound

_RANKS = 4
"""How many times the adapter's rank a momentum has, if nothing else is said."""


def mean_change(module: ModuleRound) -> LowRank:
    """``sum_i p_i B_i A_i - B_t A_t``: the mean change of the round, exact, float64, unscaled."""
    change = plus(assignment.ideal(module.moments), LowRank(module.holder.previous).scaled(-1.0))
    return plus(change, module.offset)


def plus(one: LowRank, other: LowRank) -> LowRank:
    """The sum of two matrices, float64."""
    return one.to(torch.float64).plus([] if other.is_zero else [other.value])


def remembered(memory: Memory, like: LowRank) -> LowRank:
    """The momentum of the round before; zero in the first, or where none is kept."""
    if "A" not in memory:
        return LowRank.zeros(*like.shape, torch.float64)
    return LowRank(Factors(memory["A"], memory["B"]))


def kept(momentum: LowRank, rank: int, most: int | None) -> tuple[Memory, float]:
    """A momentum's first directions as memory, and the norm of what that leaves out.

    Args:
        momentum: of this round.
        rank: the adapter's.
        most: how many directions are kept; four times the adapter's rank if not given.
    """
    rule = assignment.truncate_to_rank(most or _RANKS * rank)
    found, lacks = rule(momentum)
    if not isinstance(found.value, Factors):
        raise AssertionError("a matrix of a given rank is dense")
    return {"A": found.value.A, "B": found.value.B}, lacks
