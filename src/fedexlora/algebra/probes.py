"""Norms of matrices that are never formed: exact where they are small, by random probes elsewhere.

``E P`` of a Gaussian ``P (N, q)`` estimates ``|E|``: every column's squared norm has the mean
``|E|^2``. How far the estimate can be below the norm depends on the singular values of ``E``. The
lower tail is the heaviest for a matrix of rank one, ``|E|^2 chi^2_q``, so that ``|E|`` is bounded
by Chernoff's bound of that, ``P(chi^2_q <= q x) <= (x e^(1-x))^(q/2)``, whatever ``E`` is.

A small matrix is measured by all unit vectors instead, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import exp, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors

PROBES = 16
"""Random vectors that a large matrix is measured by."""
CHANCE = 1e-9
"""Of a bound that does not hold: one of a thousand million matrices."""
LARGEST = 1 << 20
"""Entries of a matrix that is still measured exactly, 8 MB in float64."""
_ROWS = 1024
"""Rows of a dense matrix that are held in float64 at a time."""


class Norm(NamedTuple):
    """A Frobenius norm."""

    value: float
    """The norm, or its estimate."""
    bound: float
    """What it exceeds with a chance of :data:`CHANCE` at most; the norm itself if that is known."""


@dataclass(frozen=True, slots=True)
class Probes:
    """What matrices ``(M, N)`` are measured by."""

    vectors: Tensor | None
    """``(N, q)``, float64; None for all unit vectors."""

    @staticmethod
    def of(shape: tuple[int, int], seed: int, *, largest: int | None = None) -> Probes:
        """The probes of matrices of a shape.

        Args:
            shape: ``(M, N)``.
            seed: of random ones.
            largest: the most entries of a matrix that is measured exactly; by default
                :data:`LARGEST`.
        """
        rows, columns = shape
        if rows * columns <= (LARGEST if largest is None else largest) or columns <= PROBES:
            return Probes(None)
        generator = torch.Generator().manual_seed(seed)
        return Probes(
            torch.randn(columns, PROBES, generator=generator, dtype=torch.float64),
        )

    @property
    def exact(self) -> bool:
        """Whether norms are known, and not estimated."""
        return self.vectors is None

    def zeros(self, shape: tuple[int, int]) -> Tensor:
        """The image of the zero matrix, float64."""
        rows, columns = shape
        return torch.zeros(rows, columns if self.vectors is None else PROBES, dtype=torch.float64)

    def add(self, image: Tensor, matrix: Factors | Tensor, weight: float = 1.0) -> Tensor:
        """Add ``weight * matrix @ P`` to an image, in place.

        Args:
            image: from :meth:`zeros`.
            matrix: factors of, or dense, ``(M, N)``, of any floating dtype and on any device.
            weight: what it is multiplied by.

        Returns:
            The image.
        """
        if isinstance(matrix, Factors):
            if not matrix.rank:
                return image
            down = _wide(matrix.A)
            inner = down if self.vectors is None else down @ self.vectors
            return image.addmm_(_wide(matrix.B), inner, alpha=weight)
        return self.add_rows(image, matrix.shape[0], lambda part: matrix[part], weight)

    def add_rows(
        self, image: Tensor, rows: int, read: Callable[[slice], Tensor], weight: float = 1.0
    ) -> Tensor:
        """The same of a dense matrix that is read in groups of rows.

        Args:
            image: from :meth:`zeros`.
            rows: M.
            read: the rows of a slice.
            weight: what it is multiplied by.
        """
        for start in range(0, rows, _ROWS):
            part = slice(start, min(start + _ROWS, rows))
            wide = _wide(read(part))
            image[part].add_(wide if self.vectors is None else wide @ self.vectors, alpha=weight)
        return image

    def norm(self, image: Tensor) -> Norm:
        """The Frobenius norm of the matrix that an image is of."""
        found = float(torch.linalg.vector_norm(image))
        if self.vectors is None:
            return Norm(found, found)
        return Norm(found / sqrt(PROBES), found / sqrt(PROBES * least_share(PROBES, CHANCE)))


@cache
def least_share(probes: int, chance: float) -> float:
    """The share of its mean that ``chi^2`` of so many probes falls below with a chance at most.

    Chernoff's bound, solved by bisection: the ``x`` below 1 of ``(x e^(1-x))^(q/2) = chance``.

    >>> round(least_share(16, 1e-9), 4)
    0.0284
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        if (middle * exp(1.0 - middle)) ** (probes / 2.0) > chance:
            high = middle
        else:
            low = middle
    return low


def _wide(tensor: Tensor) -> Tensor:
    """In float64 on the processor: not every accelerator has that type."""
    return tensor.detach().cpu().double()
