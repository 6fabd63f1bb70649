"""Streamed co-moments of the clients' factors.

The mean of products is the product of means plus a covariance (arXiv:2410.09432, Sec. 3.2, for
any weights ``p_i`` that sum to one):

    sum_i p_i B_i A_i = B A + R,    R = sum_i p_i (B_i - B)(A_i - A)

Clients are added one at a time, and none is kept. Adding a client of weight ``w`` to clients of
total weight ``W`` moves the co-moment ``C = W R`` by one product of rank ``r`` (Welford's update
in two variables; Chan, Golub and LeVeque 1983 for two partial sums):

    C' = C + W w / (W + w) (B_i - B)(A_i - A)

so after ``k`` clients ``C`` is held by ``(k - 1) r`` columns, or dense where that is smaller.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, break_even


@dataclass(frozen=True, slots=True)
class Moments:
    """Weighted mean factors and the co-moment of one module's clients.

    The means are float64: they are small, and the differences from them carry the residual. The
    co-moment is held in ``dtype`` (float32 by default).

    The mean factors of two clients whose changes are equal and whose factors are opposite are zero.
    What averaging the factors loses is then everything:

    >>> one = Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]]))
    >>> other = Factors(-one.A, -one.B)
    >>> moments = Moments.of(one, 10.0).add(other, 10.0)
    >>> moments.mean.product()
    tensor([[0., 0.],
            [0., 0.]], dtype=torch.float64)
    >>> moments.residual().dense()
    tensor([[3., 6.],
            [0., 0.]], dtype=torch.float64)
    """

    weight: float
    """Sum of the weights of the clients so far; not normalised."""
    mean: Factors
    """Weighted mean factors, float64."""
    comoment: LowRank
    """``weight * R``, ``(d_out, d_in)``."""

    @staticmethod
    def of(client: Factors, weight: float, dtype: torch.dtype = torch.float32) -> Moments:
        """The moments of a single client.

        Raises:
            ValueError: if ``weight`` is not positive and finite.
        """
        _check_weight(weight)
        d_out, d_in = client.shape
        mean = Factors(client.A.double().clone(), client.B.double().clone())
        return Moments(weight, mean, LowRank.zeros(d_out, d_in, dtype))

    @staticmethod
    def over(
        clients: Iterable[tuple[Factors, float]], dtype: torch.dtype = torch.float32
    ) -> Moments:
        """The moments of clients that are read one after the other; none is kept.

        The co-moment of each is kept beside the others' until the dense matrix is smaller; that
        one is float64.

        Args:
            clients: factors and weight of each, at least one.
            dtype: of the co-moment.

        Raises:
            ValueError: if there is none, a weight is not positive and finite, or shapes differ.
        """
        moments: Moments | None = None
        waiting: list[Factors] = []
        for factors, weight in clients:
            if moments is None:
                moments = Moments.of(factors, weight, dtype)
                continue
            total, mean, cross = moments._moved(factors.to(torch.float64), weight)
            waiting.append(cross)
            comoment = moments.comoment
            held = comoment.value.rank if isinstance(comoment.value, Factors) else 0
            if held + sum(x.rank for x in waiting) >= break_even(*comoment.shape):
                # In float32 every client would round the whole sum once more.
                comoment = comoment.to(torch.float64).plus(waiting)
                waiting = []
            moments = Moments(total, mean, comoment)
        if moments is None:
            raise ValueError("expected at least one client, found none")
        return replace(moments, comoment=moments.comoment.plus(waiting))

    def add(self, client: Factors, weight: float) -> Moments:
        """These moments and one more client of ``weight``.

        Raises:
            ValueError: if the weight is not positive and finite, or the shapes differ.
        """
        total, mean, cross = self._moved(client.to(torch.float64), weight)
        return Moments(total, mean, self.comoment.plus([cross]))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of clients; equal to adding them one by one but for rounding.

        Raises:
            ValueError: if the shapes differ.

        >>> x, y, z = (Factors(torch.full((1, 2), i), torch.ones(2, 1)) for i in (1.0, 2.0, 6.0))
        >>> tree = Moments.of(x, 1.0).merge(Moments.of(y, 1.0).add(z, 2.0))
        >>> line = Moments.of(x, 1.0).add(y, 1.0).add(z, 2.0)
        >>> torch.allclose(tree.residual().dense(), line.residual().dense()), tree.weight
        (True, 4.0)
        """
        total, mean, cross = self._moved(other.mean, other.weight)
        theirs = other.comoment.to(self.comoment.value.dtype).value
        return Moments(total, mean, self.comoment.plus([cross, theirs]))

    def residual(self) -> LowRank:
        """``R``: what the mean factors lack, factored with rank at most ``(k - 1) r``, or dense."""
        value = self.comoment.value
        if isinstance(value, Factors):
            return LowRank(Factors(value.A, value.B / self.weight))
        return LowRank(value / self.weight)

    def _moved(self, mean: Factors, weight: float) -> tuple[float, Factors, Factors]:
        """The weight and mean with more clients of a mean, and what the co-moment gains by it."""
        _check_weight(weight)
        if mean.A.shape != self.mean.A.shape or mean.B.shape != self.mean.B.shape:
            raise ValueError(
                f"expected factors A {tuple(self.mean.A.shape)} and B {tuple(self.mean.B.shape)}, "
                f"found A {tuple(mean.A.shape)} and B {tuple(mean.B.shape)}"
            )
        total = self.weight + weight
        d_a, d_b = mean.A - self.mean.A, mean.B - self.mean.B
        share = weight / total
        dtype = self.comoment.value.dtype
        cross = Factors(d_a.to(dtype), (d_b * (self.weight * share)).to(dtype))
        moved = Factors(self.mean.A + d_a * share, self.mean.B + d_b * share)
        return total, moved, cross


def _check_weight(weight: float) -> None:
    if not 0.0 < weight < float("inf"):
        raise ValueError(f"expected a positive, finite weight, found {weight}")
