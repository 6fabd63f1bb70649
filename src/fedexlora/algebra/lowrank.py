"""A matrix that is held as factors for as long as those are smaller than its dense form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedexlora.algebra import product
from fedexlora.algebra.factors import Factors, inner, squared_norm

_ROWS = 1024
"""Rows of a dense matrix that are widened to float64 at a time."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """A ``(d_out, d_in)`` matrix: :class:`Factors`, or a dense tensor where that is not larger.

    >>> piece = Factors(torch.ones(1, 4), torch.ones(4, 1))
    >>> total = LowRank.zeros(4, 4, torch.float64)
    >>> total.plus([piece]).numel  # factors of rank 1
    8
    >>> total.plus([piece, piece]).numel  # factors of rank 2 would be as large
    16
    """

    value: Factors | Tensor

    @staticmethod
    def zeros(d_out: int, d_in: int, dtype: torch.dtype) -> LowRank:
        """The zero matrix, as factors of rank 0."""
        return LowRank(Factors.empty(d_out, d_in, dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        rows, columns = self.value.shape
        return rows, columns

    @property
    def is_zero(self) -> bool:
        """Whether this is the zero matrix by construction (factors of rank 0)."""
        return isinstance(self.value, Factors) and self.value.rank == 0

    @property
    def numel(self) -> int:
        """How many numbers are held."""
        if isinstance(self.value, Factors):
            return self.value.A.numel() + self.value.B.numel()
        return self.value.numel()

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The matrix itself, ``(d_out, d_in)``, multiplied out in ``dtype``."""
        if isinstance(self.value, Factors):
            return self.value.to(dtype).product()
        return self.value.to(dtype)

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same matrix with what is held in ``dtype``."""
        return LowRank(self.value.to(dtype))

    def on(self, device: torch.device) -> LowRank:
        """The same matrix on a device."""
        value = self.value
        return LowRank(value.on(device) if isinstance(value, Factors) else value.to(device))

    def scaled(self, factor: float) -> LowRank:
        """The matrix times ``factor``."""
        if isinstance(self.value, Factors):
            return LowRank(self.value.scaled(factor))
        return LowRank(self.value * factor)

    def plus(self, terms: Sequence[Factors | Tensor]) -> LowRank:
        """This matrix plus every term, in the dtype of this matrix; neither is written.

        Factors are stacked, which rounds nothing, until the stack would be larger than the dense
        matrix; from then on the sum is dense.

        Args:
            terms: factors of, or dense, ``(d_out, d_in)`` matrices.

        Raises:
            ValueError: if a term has another shape.
        """
        for term in terms:
            if tuple(term.shape) != self.shape:
                raise ValueError(f"expected terms of {self.shape}, found {tuple(term.shape)}")
        dtype = self.value.dtype
        factored = [x.to(dtype) for x in (self.value, *terms) if isinstance(x, Factors)]
        rank = sum(x.rank for x in factored)
        if len(factored) == 1 + len(terms) and rank < break_even(*self.shape):
            return LowRank(stack(factored))
        total = self.dense(dtype).clone()
        for term in terms:
            _add_into(total, term)
        return LowRank(total)

    def accumulate(self, piece: LowRank) -> LowRank:
        """This matrix plus ``piece``, compacted where factors would no longer be smaller.

        So nothing is rounded that need not be, and the sum is dense only where nothing smaller is
        lossless (see :func:`fedexlora.algebra.product.compact`).
        """
        if piece.is_zero:
            return self
        if isinstance(self.value, Factors) and isinstance(piece.value, Factors):
            parts = [self.value, piece.value.to(self.value.dtype)]
            whole, limit = stack(parts), break_even(*self.shape)
            if whole.rank >= limit:
                whole = product.compact(whole)
            if whole.rank < limit:
                return LowRank(whole)
        return self.plus([piece.value])

    def squared_norm(self) -> float:
        """Squared Frobenius norm, in float64, from Gram matrices where factors are held."""
        if isinstance(self.value, Factors):
            return squared_norm(self.value)
        return float(torch.linalg.vector_norm(self.value, dtype=torch.float64)) ** 2

    def inner(self, other: Factors) -> float:
        """Frobenius inner product with ``other``, in float64, without multiplying it out."""
        if isinstance(self.value, Factors):
            return inner(self.value, other)
        wide, found = other.to(torch.float64), 0.0
        for rows, b in zip(torch.split(self.value, _ROWS), torch.split(wide.B, _ROWS), strict=True):
            found += float(((b.T @ rows.double()) * wide.A).sum())
        return found


def break_even(d_out: int, d_in: int) -> int:
    """The lowest rank whose factors are not smaller than the dense ``(d_out, d_in)`` matrix.

    >>> break_even(4096, 4096), break_even(1024, 4096)
    (2048, 820)
    """
    return -(-d_out * d_in // (d_out + d_in))


def stack(parts: Sequence[Factors]) -> Factors:
    """The sum of products as one pair: rows of ``A`` and columns of ``B`` side by side.

    >>> x, y = (Factors(torch.full((1, 2), i), torch.ones(2, 1)) for i in (1.0, 2.0))
    >>> both = stack([x, y])
    >>> both.rank, torch.equal(both.product(), x.product() + y.product())
    (2, True)
    """
    used = [part for part in parts if part.rank] or list(parts[:1])
    return Factors(torch.cat([p.A for p in used], dim=0), torch.cat([p.B for p in used], dim=1))


def _add_into(total: Tensor, term: Factors | Tensor) -> None:
    """Add ``term`` to ``total``, which the caller owns."""
    if isinstance(term, Factors):
        wide = term.to(total.dtype)
        total.addmm_(wide.B, wide.A)
    else:
        total.add_(term.to(total.dtype))
