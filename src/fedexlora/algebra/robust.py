"""Rules against bad updates, as functions of the Gram matrix of the clients' changes alone.

A client's change is a point in the space of updates, and ``K_ij = <D_i, D_j>`` holds all that the
rules need: norms are ``K_ii``, distances ``K_ii + K_jj - 2 K_ij``, and the norm of any weighted
sum ``w^T K w``. The pairs ``(B, A)`` and ``(B Q, Q^-1 A)`` are the same update and have the same
``K``. Every rule answers with weights, so that what it makes is a weighted mean like any other.
What a gauge does to a mean of factors ``K`` cannot show; that is a client's strain.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import median

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors, Sizes

_BLOCK = 1 << 20
"""Columns of flat tensors that are held in float64 at a time."""
_STEPS = 1000
_SETTLED = 1e-12
"""Largest relative change of a share in a step at which the geometric median is as found."""
_SMOOTHING = 1e-6
"""Of the median norm: the distance below which a point pulls no harder (arXiv:1912.13445)."""


@dataclass(frozen=True, slots=True)
class Reweighted:
    """What a rule makes of ``k`` clients."""

    weights: tuple[float, ...]
    """What each counts; 0 for who is rejected. Only ratios matter, also to ``stay``."""
    kept: tuple[float, ...]
    """The share of each change that counts: below 1 for who is clipped, 0 for who is rejected."""
    scores: tuple[float, ...]
    """What the rule looked at: a norm or a distance, the larger the worse."""
    stay: float = 0.0
    """The weight of no change at all: what clipped clients lose."""

    def without(self, rejected: Collection[int]) -> Reweighted:
        """The same of the others: those at these places do not count, nor does what they lost."""

        def but(values: Sequence[float]) -> tuple[float, ...]:
            return tuple(0.0 if i in rejected else x for i, x in enumerate(values))

        lost = sum(self.weights[i] * (1.0 / self.kept[i] - 1.0) for i in rejected if self.kept[i])
        return Reweighted(but(self.weights), but(self.kept), self.scores, self.stay - lost)


def gram(changes: Sequence[Factors]) -> Tensor:
    """Frobenius inner products of ``B_i @ A_i``, ``(k, k)`` float64, from rank by rank matrices.

    Args:
        changes: factors of matrices of one shape ``(d_out, d_in)``, of any ranks.

    >>> up, down = (Factors(torch.full((1, 3), i), torch.ones(2, 1)) for i in (1.0, -1.0))
    >>> gram([up, down])
    tensor([[ 6., -6.],
            [-6.,  6.]], dtype=torch.float64)
    """
    wide = [x.to(torch.float64) for x in changes]
    owner = torch.tensor([i for i, x in enumerate(wide) for _ in range(x.rank)])
    a, b = torch.cat([x.A for x in wide]), torch.cat([x.B for x in wide], dim=1)
    rows = []
    for x in wide:
        both = ((x.B.T @ b) * (x.A @ a.T)).sum(0)
        rows.append(torch.zeros(len(wide), dtype=torch.float64).index_add_(0, owner, both.cpu()))
    return _symmetric(torch.stack(rows))


def flat_gram(changes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Inner products of ``x - x0`` for tensors of one shape, ``(k, k)`` float64."""
    flat = [(x.reshape(-1), x0.reshape(-1)) for x, x0 in changes]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for at in range(0, flat[0][0].numel(), _BLOCK):
        part = slice(at, at + _BLOCK)
        block = torch.stack([x[part].double() - x0[part].double() for x, x0 in flat])
        total += (block @ block.T).cpu()
    return _symmetric(total)


def norms(gram: Tensor) -> Tensor:
    """Norms of the changes, ``(k,)``; rounding below zero is cut off.

    >>> norms(torch.tensor([[9.0, 0.0], [0.0, 16.0]]))
    tensor([3., 4.])
    """
    return gram.diagonal().clamp(min=0.0).sqrt()


def distances(gram: Tensor) -> Tensor:
    """Squared distances between the changes, ``(k, k)``; rounding below zero is cut off.

    >>> distances(torch.tensor([[9.0, 0.0], [0.0, 16.0]]))  # at right angles: 3, 4, 5
    tensor([[ 0., 25.],
            [25.,  0.]])
    """
    own = gram.diagonal()
    return (own[:, None] + own[None, :] - 2.0 * gram).clamp(min=0.0).fill_diagonal_(0.0)


def clip(gram: Tensor, weights: Sequence[float], limit: float | None = None) -> Reweighted:
    """Scale every change that is longer than ``limit`` down to it.

    With ``c_i = min(1, limit / |D_i|)`` the result is the mean of the clients with weights
    ``p_i c_i`` and of no change with weight ``sum_i p_i (1 - c_i)``.

    Args:
        gram: ``K``, ``(k, k)``.
        weights: what each client counts.
        limit: the longest change; by default the median of the norms, the lower of two, in which
            all clients count alike: a weight is something that a client claims.

    >>> found = clip(torch.diag(torch.tensor([1.0, 1.0, 100.0])), [1.0, 1.0, 1.0])
    >>> found.weights, found.stay  # the third counts a tenth, and no change for the rest
    ((1.0, 1.0, 0.1), 0.9)
    """
    found = norms(gram)
    longest = float(found.median()) if limit is None else limit
    kept = tuple(1.0 if x <= longest else longest / x for x in found.tolist())
    scaled = tuple(w * c for w, c in zip(weights, kept, strict=True))
    stay = sum(w * (1.0 - c) for w, c in zip(weights, kept, strict=True))
    return Reweighted(scaled, kept, tuple(found.tolist()), stay)


def multi_krum(gram: Tensor, weights: Sequence[float], bad: int) -> Reweighted:
    """Keep the ``k - f`` clients that are closest to others (Blanchard et al., arXiv:1703.02757).

    A client's score is the sum of the ``k - f - 2`` smallest squared distances to others. Those
    that are kept count by their weights.

    Args:
        gram: ``K``, ``(k, k)``.
        weights: what each client counts.
        bad: ``f``, how many clients may be bad; the guarantee needs ``k >= 2 f + 3``.

    Raises:
        ValueError: if there are fewer clients than that.

    >>> at = torch.tensor([[1.0], [1.1], [0.9], [1.0], [9.0]], dtype=torch.float64)
    >>> multi_krum(at @ at.T, [1.0] * 5, bad=1).weights
    (1.0, 1.0, 1.0, 1.0, 0.0)
    """
    count = len(weights)
    _check_count(count, krum_needs(bad), bad)
    nearest = distances(gram).sort(dim=1).values[:, 1 : 1 + max(count - bad - 2, 0)]
    return _without_worst(nearest.sum(dim=1), weights, bad)


def trimmed_mean(gram: Tensor, weights: Sequence[float], bad: int) -> Reweighted:
    """Leave out the ``f`` clients that are furthest from the geometric median of all.

    It needs no coordinates, which a trimmed mean by entries would. In the median all clients count
    alike; those that are kept count by their weights.

    Args:
        gram: ``K``, ``(k, k)``.
        weights: what each client counts.
        bad: ``f``, how many clients may be bad.

    Raises:
        ValueError: unless more than half of the clients are not bad.

    >>> at = torch.tensor([[1.0], [1.1], [-9.0]], dtype=torch.float64)
    >>> trimmed_mean(at @ at.T, [1.0] * 3, bad=1).weights
    (1.0, 1.0, 0.0)
    """
    count = len(weights)
    _check_count(count, trimming_needs(bad), bad)
    return _without_worst(_from_point(gram, _weiszfeld(gram, [1.0] * count)), weights, bad)


def geometric_median(gram: Tensor, weights: Sequence[float]) -> Reweighted:
    """The point ``z`` that minimises ``sum_i p_i |z - D_i|``, as weights of the clients.

    Smoothed Weiszfeld iterations (Pillutla et al., arXiv:1912.13445, Alg. 2), which never leave
    the convex hull and so need ``K`` alone. The point is ``sum_i w_i D_i``; nobody is rejected,
    and who is far away counts little.

    Args:
        gram: ``K``, ``(k, k)``.
        weights: what each client counts in the sum that is minimised.

    On a line it is the median, wherever the last one is:

    >>> at = torch.tensor([[1.0], [2.0], [900.0]], dtype=torch.float64)
    >>> [round(share, 3) for share in geometric_median(at @ at.T, [1.0] * 3).weights]
    [0.0, 1.0, 0.0]
    """
    found = _weiszfeld(gram, weights)
    ones = (1.0,) * len(weights)
    return Reweighted(tuple(found.tolist()), ones, tuple(_from_point(gram, found).tolist()))


def strain(weights: Sequence[float], sizes: Sequence[Sizes], mean: float) -> tuple[float, ...]:
    """By how much a mean of factors may exceed the mean product because of each client.

    ``(B, A)`` and ``(B Q, Q^-1 A)`` are the same update, but not the same share of ``B̄ Ā``. What is
    too much there the residual takes away again, at the cost of digits. Of client ``i`` it is
    ``p_i max(|B_i a|, |b A_i|) / |M|``, where ``a`` and ``b`` are as large as the median clients'
    and the norms of the products are bounded by those of the factors, ``|X Y| <= |X| |Y|_2``.

    Args:
        weights: what each client counts; their sum is at most 1.
        sizes: of each client's factors.
        mean: norm of the mean product ``M = sum_i p_i B_i A_i``.

    >>> [round(x) for x in strain([0.5, 0.5], [Sizes(1.0, 1.0, 1.0, 1.0)] * 2, mean=1.0)]
    [0, 0]
    """
    usual = Sizes(*(median(column) for column in zip(*sizes, strict=True)))
    found = []
    for weight, own in zip(weights, sizes, strict=True):
        up = min(own.B * usual.A_spectral, own.B_spectral * usual.A)
        down = min(own.A * usual.B_spectral, own.A_spectral * usual.B)
        most = weight * max(up, down)
        found.append(most / mean if mean > 0.0 else (inf if most > 0.0 else 0.0))
    return tuple(found)


def krum_needs(bad: int) -> int:
    """The fewest clients of which multi-Krum stands ``bad``."""
    return 2 * bad + 3 if bad else 1


def trimming_needs(bad: int) -> int:
    """The fewest clients of which a trimmed mean stands ``bad``."""
    return 2 * bad + 1


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2.0


def _check_count(count: int, needed: int, bad: int) -> None:
    if bad < 0 or count < needed:
        raise ValueError(f"expected at least {needed} clients for {bad} bad ones, found {count}")


def _without_worst(scores: Tensor, weights: Sequence[float], bad: int) -> Reweighted:
    """Reject the ``bad`` clients of the largest scores; the later of equal ones."""
    order = scores.sort(stable=True).indices.tolist()
    rejected = set(order[len(order) - bad :])
    kept = tuple(0.0 if i in rejected else 1.0 for i in range(len(order)))
    counted = tuple(w * c for w, c in zip(weights, kept, strict=True))
    return Reweighted(counted, kept, tuple(scores.tolist()))


def _from_point(gram: Tensor, shares: Tensor) -> Tensor:
    """Distances of all changes from ``sum_i shares_i D_i``, ``(k,)``."""
    along = gram @ shares
    squared = gram.diagonal() - 2.0 * along + shares @ along
    return squared.clamp(min=0.0).sqrt()


def _weiszfeld(gram: Tensor, weights: Sequence[float]) -> Tensor:
    """Shares, ``(k,)`` float64 with sum 1, of the changes in their geometric median."""
    start = torch.tensor(weights, dtype=torch.float64)
    start = start / start.sum()
    floor = max(_SMOOTHING * float(norms(gram).median()), sqrt(torch.finfo(torch.float64).tiny))
    shares = start
    for _ in range(_STEPS):
        pull = start / _from_point(gram, shares).clamp(min=floor)
        moved = pull / pull.sum()
        # Relative, so that who is very far away has its share to as many digits as the others.
        settled = bool(((moved - shares).abs() <= _SETTLED * moved).all())
        shares = moved
        if settled:
            break
    return shares
