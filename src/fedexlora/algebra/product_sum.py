"""A weighted sum of products ``sum_i c_i B_i A_i``, streamed, at any rank that is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import stack
from fedexlora.algebra.product import LOSSLESS, Truncated, norm, truncate, truncate_share


class ProductSum:
    """The sum, as a stack of what was added; compacted only where it is wider than the matrix.

    So memory is bounded by the matrix, however many terms are added, and nothing is rounded
    before the end: factors are held as they came, and their weights beside them in float64.

    Args:
        d_out: rows of the matrix.
        d_in: its columns.
    """

    def __init__(self, d_out: int, d_in: int) -> None:
        self._shape = d_out, d_in
        self._terms: list[Factors] = []
        self._weights: list[Tensor] = []

    def add(self, term: Factors, weight: float) -> None:
        """Add ``weight * term.B @ term.A``.

        Raises:
            ValueError: if the term has another shape.
        """
        if term.shape != self._shape:
            raise ValueError(f"expected factors of {self._shape}, found {term.shape}")
        self._terms.append(term)
        self._weights.append(torch.full((term.rank,), weight, dtype=torch.float64))
        if len(self._terms) > 1 and sum(x.rank for x in self._terms) > min(self._shape):
            both, weights = self._stacked()
            wide = Factors(both.A.double(), both.B.double() * weights)
            whole = truncate_share(wide, LOSSLESS).factors
            self._terms = [whole]
            self._weights = [torch.ones(whole.rank, dtype=torch.float64)]

    def norm(self) -> float:
        """Frobenius norm, in float64."""
        return norm(*self._stacked())

    def at_rank(self, rank: int) -> Truncated:
        """The best approximation of a rank."""
        both, weights = self._stacked()
        return truncate(both, rank, weights)

    def within(self, share: float = LOSSLESS) -> Truncated:
        """The approximation of lowest rank that drops at most ``share`` of the norm.

        By default that is the whole sum at its numerical rank.
        """
        both, weights = self._stacked()
        return truncate_share(both, share, weights)

    def _stacked(self) -> tuple[Factors, Tensor]:
        if not self._terms:
            return Factors.empty(*self._shape, torch.float32), torch.zeros(0, dtype=torch.float64)
        dtype = torch.float32
        for term in self._terms:
            dtype = torch.promote_types(dtype, term.dtype)
        # What is stacked already stands for its parts, so that both are not held at once.
        self._terms = [stack([term.to(dtype) for term in self._terms])]
        self._weights = [torch.cat(self._weights)]
        return self._terms[0], self._weights[0]
