"""The two choices that make a method: the next adapter, and what happens to the remainder.

Any next adapter ``(A', B')`` is exact if the remainder ``M - B' A'`` of the ideal mean product
``M`` goes to the frozen weight (arXiv:2410.09432, Sec. 3.2 and Table 4). It is arithmetic on
factors; only a remainder that is dense, as those of very many clients are, is approximated by
randomised subspace iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, break_even, stack
from fedexlora.algebra.moments import Moments
from fedexlora.algebra.product import Truncated, balanced, compact, svd, truncate, truncate_share

_SMALL = 1024
"""The shorter side up to which a dense matrix is decomposed whole."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Whom a next adapter is for; its factors are in the scaling of the moments."""

    rank: int
    """The rank of its adapter."""
    previous: Factors
    """The factors that it started the round from."""
    fresh: Callable[[], Factors]
    """Draws newly initialised factors; their product is usually zero."""


Assignment = Callable[[Moments, Holder], Factors]
"""Moments and a holder to the holder's next adapter, float64."""

RemainderRule = Callable[[LowRank], tuple[LowRank, float]]
"""A remainder to what the frozen weight receives of it, and the norm of what it does not."""


def mean(moments: Moments, holder: Holder) -> Factors:
    """The mean factors (arXiv:2410.09432, eq. 9); at another rank, the best ones of their product.

    Clients of several ranks are averaged as if padded with zeros to the largest.

    >>> one, other = (Factors(torch.full((1, 2), i), torch.ones(2, 1)) for i in (1.0, 4.0))
    >>> moments = Moments.of(one, 2.0).add(other, 1.0)
    >>> mean(moments, Holder(rank=1, previous=one, fresh=lambda: one)).A
    tensor([[2., 2.]], dtype=torch.float64)
    """
    if moments.mean.rank == holder.rank:
        return moments.mean
    return _filled(_leading(LowRank(moments.mean), holder.rank), holder)


def best(moments: Moments, holder: Holder) -> Factors:
    """The best approximation of the ideal ``M`` at the holder's rank, balanced (Eckart-Young).

    >>> one, other = (Factors(torch.full((1, 3), i), torch.ones(4, 1)) for i in (1.0, 2.0))
    >>> moments = Moments.of(one, 1.0).add(other, 1.0)  # the ideal has rank 1
    >>> found = best(moments, Holder(rank=1, previous=one, fresh=lambda: one))
    >>> torch.allclose(found.product(), ideal(moments).dense())
    True
    """
    return _filled(_leading(ideal(moments), holder.rank), holder)


def best_aligned(moments: Moments, holder: Holder) -> Factors:
    """:func:`best`, turned towards the holder's previous factors.

    ``(B Q, Q^T A)`` is the same update for every orthogonal ``Q``; the one that is nearest to the
    previous pair is ``U V^T`` of the decomposition of ``B^T B_prev + A A_prev^T`` (orthogonal
    Procrustes; Schoenemann 1966).
    """
    found, previous = best(moments, holder), holder.previous.to(torch.float64)
    u, _, vh = torch.linalg.svd(found.B.T @ previous.B + found.A @ previous.A.T)
    turn = u @ vh
    return Factors(turn.T @ found.A, found.B @ turn)


def best_orthonormal(moments: Moments, holder: Holder) -> Factors:
    """:func:`best` with all of the singular values in ``B``: the rows of ``A`` are orthonormal.

    >>> one = Factors(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
    >>> found = best_orthonormal(Moments.of(one, 1.0), Holder(1, one, lambda: one))
    >>> round(float(found.A.norm()), 6), round(float(found.B.norm()), 6)
    (1.0, 5.0)
    """
    u, s, vh = _directions(ideal(moments), holder.rank)
    return _filled(Factors(vh.contiguous(), u * s), holder)


def fresh(moments: Moments, holder: Holder) -> Factors:
    """A newly initialised adapter: all of the ideal goes to the remainder."""
    del moments
    return holder.fresh().to(torch.float64)


def ideal(moments: Moments) -> LowRank:
    """The mean product ``M = B A + R``, ``(d_out, d_in)``, float64.

    >>> one = Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]]))
    >>> ideal(Moments.of(one, 1.0).add(Factors(-one.A, -one.B), 1.0)).dense()
    tensor([[3., 6.],
            [0., 0.]], dtype=torch.float64)
    """
    return _sum(moments.residual(), moments.mean)


def remainder(moments: Moments, adapter: Factors) -> LowRank:
    """``M - B' A'`` for a next adapter ``(A', B')``, at its numerical rank, float32.

    For the mean factors themselves it is the residual ``R``, without a difference that cancels.

    Any adapter is exact with it, also one that nobody trained:

    >>> one, other = (Factors(torch.full((1, 3), i), torch.ones(4, 1)) for i in (1.0, 2.0))
    >>> moments = Moments.of(one, 1.0).add(other, 1.0)
    >>> anything = Factors(torch.full((1, 3), 7.0), torch.ones(4, 1)).to(torch.float64)
    >>> whole = remainder(moments, anything).dense() + anything.product()
    >>> torch.allclose(whole, ideal(moments).dense())
    True
    """
    residual = moments.residual()
    if adapter is moments.mean:
        return residual
    whole = _sum(residual, stack([moments.mean, adapter.scaled(-1.0)]))
    if isinstance(whole.value, Factors):
        low = compact(whole.value)
        whole = LowRank(low if low.rank < break_even(*low.shape) else low.product())
    return whole.to(residual.value.dtype)


def keep(remainder: LowRank) -> tuple[LowRank, float]:
    """All of the remainder: the aggregation is exact.

    >>> keep(LowRank(Factors(torch.ones(1, 2), torch.ones(2, 1))))[1]
    0.0
    """
    return remainder, 0.0


def drop(remainder: LowRank) -> tuple[LowRank, float]:
    """None of the remainder: exact only where it is zero anyway.

    >>> kept, lacks = drop(LowRank(Factors(torch.ones(1, 2), torch.ones(2, 1))))
    >>> kept.is_zero, lacks
    (True, 2.0)
    """
    zero = LowRank.zeros(*remainder.shape, remainder.value.dtype)
    return zero, sqrt(remainder.squared_norm())


def truncate_to_rank(rank: int) -> RemainderRule:
    """The best ``rank`` directions of the remainder.

    >>> whole = LowRank(Factors(torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2)))
    >>> kept, lacks = truncate_to_rank(1)(whole)
    >>> kept.value.rank, round(lacks, 6)
    (1, 3.0)
    """

    def rule(remainder: LowRank) -> tuple[LowRank, float]:
        if isinstance(remainder.value, Factors):
            return _bounded(truncate(remainder.value, rank))
        return _approximated(remainder, _leading(remainder, rank))

    return rule


def truncate_to_energy(energy: float) -> RemainderRule:
    """The fewest directions that hold a share ``energy`` of the remainder's squared norm.

    Of a dense remainder of more than 1,024 rows and columns that needs more than half of its
    directions, all are kept: factors of them would be no smaller.

    >>> whole = LowRank(Factors(torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2)))
    >>> [truncate_to_energy(share)(whole)[0].value.rank for share in (0.6, 0.7)]  # 16 of 25 is 0.64
    [1, 2]
    """

    def rule(remainder: LowRank) -> tuple[LowRank, float]:
        share = sqrt(1.0 - energy)
        if isinstance(remainder.value, Factors):
            return _bounded(truncate_share(remainder.value, share))
        whole = remainder.squared_norm()
        for u, s, vh in _ever_more(remainder):
            left = whole - s.square().cumsum(0)
            count = int((left > share**2 * whole).sum()) + 1
            if count <= len(s):
                kept = balanced(u[:, :count], s[:count], vh[:count], torch.float64)
                low, lacks = _approximated(remainder, kept)
                smaller = count < break_even(*remainder.shape)
                return low if smaller else LowRank(low.dense(remainder.value.dtype)), lacks
        return remainder, 0.0

    return rule


def _sum(matrix: LowRank, more: Factors) -> LowRank:
    """A sum in float64 that is factored if ``matrix`` is, whatever its rank."""
    if isinstance(matrix.value, Factors):
        return LowRank(stack([matrix.value.to(torch.float64), more]))
    return matrix.to(torch.float64).plus([more])


def _bounded(kept: Truncated) -> tuple[LowRank, float]:
    return LowRank(kept.factors), kept.share * kept.norm


def _approximated(remainder: LowRank, kept: Factors) -> tuple[LowRank, float]:
    """An approximation of a dense remainder, and the norm of what it lacks."""
    short = kept.to(remainder.value.dtype)
    return LowRank(short), float((remainder.dense() - short.to(torch.float64).product()).norm())


def _leading(matrix: LowRank, rank: int) -> Factors:
    """The first ``rank`` singular directions, balanced, float64; fewer if the rest is rounding."""
    return balanced(*_directions(matrix, rank), torch.float64)


def _directions(matrix: LowRank, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same directions ``U``, ``S`` and ``Vh``."""
    if isinstance(matrix.value, Factors):
        u, s, vh = svd(matrix.value)
    else:
        u, s, vh = _randomised(matrix.value, rank)
    floor = s[:1] * torch.finfo(torch.float32).eps
    count = min(rank, int((s > floor).sum()))
    return u[:, :count], s[:count], vh[:count]


def _ever_more(matrix: LowRank) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Singular directions of a dense matrix: all of a small one, and up to half of a large one."""
    if min(matrix.shape) <= _SMALL:
        yield torch.linalg.svd(matrix.dense(), full_matrices=False)
        return
    rank = 16
    while rank < min(matrix.shape) // 2:
        yield _directions(matrix, rank)
        rank *= 2


def _randomised(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular directions of a dense matrix by subspace iteration (Halko et al. 2011, Sec. 5.1).

    They need not be the very best ones: whatever they lack is part of the remainder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = min(rank + 8, *matrix.shape)
        u, s, v = torch.svd_lowrank(matrix.to(torch.float64), q=size, niter=4)
    return u, s, v.T


def _filled(adapter: Factors, holder: Holder) -> Factors:
    """An adapter at its holder's rank: rows and columns that it lacks are fresh ones.

    Zeros on both sides would never receive a gradient.
    """
    if adapter.rank == holder.rank:
        return adapter
    rest = holder.fresh().to(torch.float64)
    return stack([adapter, Factors(rest.A[adapter.rank :], rest.B[:, adapter.rank :])])
