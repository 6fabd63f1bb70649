"""A weighted sum of products ``sum_i c_i B_i A_i`` whose factors are read when they are needed.

One side of the factors is stacked at a time, and the result is made in groups of rows: the sum of
many adapters takes little more memory than one of their stacked sides. Nothing is rounded before
the end: factors are stacked as they come, in float32 or wider, and weights are held in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.product import LOSSLESS, Core, Maps, from_left, from_right, triangle

Side = Literal["A", "B"]
_ROWS = 64
"""Rows of a result that are made at a time."""


@dataclass(frozen=True, slots=True)
class Term:
    """``weight * B @ A``, of factors that need not be in memory."""

    rank: int
    weight: float
    read: Callable[[Side], Tensor]
    """Reads ``A (rank, d_in)`` or ``B (d_out, rank)``."""

    @staticmethod
    def of(factors: Factors, weight: float) -> Term:
        """A term that is in memory."""
        return Term(factors.rank, weight, lambda side: factors.A if side == "A" else factors.B)


@dataclass(frozen=True, slots=True)
class Cut:
    """The sum at a lower rank, not made yet."""

    source: ProductSum
    maps: Maps

    @property
    def rank(self) -> int:
        """Its rank."""
        return self.maps.up.shape[1]

    def rows(self, side: Side) -> Iterator[Tensor]:
        """Groups of consecutive rows of balanced ``A (rank, d_in)`` or ``B (d_out, rank)``.

        In float32, or in float64 if a term is.
        """
        stack = self.source.stacked(side)
        small = self.maps.down if side == "A" else self.source.weights[:, None] * self.maps.up
        for start in range(0, self.rank if side == "A" else stack.shape[0], _ROWS):
            part = slice(start, start + _ROWS)
            yield from_left(small[part], stack) if side == "A" else from_right(stack[part], small)

    def factors(self) -> Factors:
        """Both sides, in memory."""
        d_out, d_in = self.source.shape
        empty = Factors.empty(d_out, d_in, self.source.stacked("A").dtype)
        if self.rank == 0:
            return empty
        return Factors(torch.cat(list(self.rows("A"))), torch.cat(list(self.rows("B"))))


class ProductSum:
    """The sum.

    Args:
        d_out: rows of the matrix.
        d_in: its columns.
        terms: what is summed. Where they are wider than the matrix, groups of them are compacted
            first, so that memory does not grow with their number.

    >>> x = Factors(torch.ones(1, 3), torch.ones(4, 1))
    >>> total = ProductSum(4, 3, [Term.of(x, 2.0), Term.of(x, 3.0)])
    >>> cut = total.within()  # at its numerical rank
    >>> cut.rank, round(float(cut.factors().product()[0, 0]), 6)
    (1, 5.0)
    """

    def __init__(self, d_out: int, d_in: int, terms: Sequence[Term]) -> None:
        self.shape = d_out, d_in
        self._terms = list(terms)
        if sum(term.rank for term in terms) > min(self.shape):
            self._terms = self._grouped()
        self.weights = torch.cat(
            [
                torch.zeros(0, dtype=torch.float64),
                *(torch.full((t.rank,), t.weight, dtype=torch.float64) for t in self._terms),
            ]
        )
        """The weight of every stacked column of ``B``, float64."""

    @property
    def norm(self) -> float:
        """Frobenius norm, in float64."""
        return self._core.norm

    def at_rank(self, rank: int) -> Cut:
        """The best approximation of a rank (Eckart-Young)."""
        return Cut(self, self._core.maps(rank))

    def within(self, share: float = LOSSLESS) -> Cut:
        """The approximation of lowest rank that drops at most ``share`` of the norm.

        By default that is the whole sum at its numerical rank.
        """
        return Cut(self, self._core.maps(self._core.rank_within(share)))

    def stacked(self, side: Side) -> Tensor:
        """All terms' ``A`` below, or ``B`` beside, each other."""
        rank, (d_out, d_in) = sum(term.rank for term in self._terms), self.shape
        out = torch.empty((rank, d_in) if side == "A" else (d_out, rank))
        start = 0
        for term in self._terms:
            part, stop = term.read(side), start + term.rank
            out = out.to(torch.promote_types(out.dtype, part.dtype))
            target = out[start:stop] if side == "A" else out[:, start:stop]
            if part.shape != target.shape:
                raise ValueError(
                    f"expected {side} {tuple(target.shape)}, found {tuple(part.shape)}"
                )
            target.copy_(part)
            start = stop
        return out

    @cached_property
    def _core(self) -> Core:
        r_b = triangle(self.stacked("B")) * self.weights
        return Core(r_b, triangle(self.stacked("A").T))

    def _grouped(self) -> list[Term]:
        """Few terms of the same sum, the first of which is what was compacted, in float64."""
        held: list[Term] = []
        for term in self._terms:
            if len(held) > 1 and sum(x.rank for x in (*held, term)) > min(self.shape):
                held = [_compacted(self.shape, held)]
            held.append(term)
        return held


def _compacted(shape: tuple[int, int], terms: Sequence[Term]) -> Term:
    """Several terms as one, at its numerical rank, in float64."""
    wide = [replace(term, read=partial(_widened, term)) for term in terms]
    return Term.of(ProductSum(*shape, wide).within().factors(), 1.0)


def _widened(term: Term, side: Side) -> Tensor:
    return term.read(side).double()
