"""What plain averaging of the factors loses: ``R`` against the ideal mean product ``M = B A + R``.

The deviation of arXiv:2410.09432, Sec. 5, relative to the ideal. It comes from Gram matrices and
from ``R`` itself, never from a difference of two dense matrices, which would cancel:

    |M|^2 = |B A|^2 + 2 <R, B A> + |R|^2
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from fedexlora.algebra.factors import squared_norm
from fedexlora.algebra.moments import Moments


@dataclass(frozen=True, slots=True)
class Deviation:
    """Frobenius norms of one module's unscaled residual and ideal update."""

    residual: float
    """``|R|``."""
    ideal: float
    """``|M|``, the norm of the mean product."""

    @property
    def relative(self) -> float:
        """``|R| / |M|``; 0 where both are zero."""
        return ratio(self.residual, self.ideal)


def deviation(moments: Moments) -> Deviation:
    """The deviation of averaging, for the clients in ``moments``.

    >>> import torch
    >>> from fedexlora.algebra.factors import Factors
    >>> one = Factors(torch.ones(1, 3), torch.ones(2, 1))
    >>> alike = Moments.of(one, 1.0).add(one, 1.0)
    >>> deviation(alike).relative
    0.0
    >>> opposite = Moments.of(one, 1.0).add(Factors(-one.A, -one.B), 1.0)  # the same product
    >>> deviation(opposite).relative
    1.0
    """
    residual = moments.residual()
    r2 = residual.squared_norm()
    m2 = squared_norm(moments.mean) + 2.0 * residual.inner(moments.mean) + r2
    return Deviation(sqrt(r2), sqrt(max(m2, 0.0)))


def ratio(part: float, whole: float) -> float:
    """``part / whole``, where nothing over nothing is 0 and something over nothing is infinite.

    >>> ratio(1.0, 4.0), ratio(0.0, 0.0), ratio(1.0, 0.0)
    (0.25, 0.0, inf)
    """
    if whole == 0.0:
        return 0.0 if part == 0.0 else float("inf")
    return part / whole
