"""Singular values, truncation and compaction of a factored matrix, by thin QR.

With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, ``B A = Q_B (R_B R_A^T) Q_A^T``: the singular values
are those of a core of size rank by rank, and no dense matrix is ever formed or decomposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors

LOSSLESS = 2.0**-30
"""The share of a matrix's norm that compaction may leave out: 1/64 of a float32's rounding."""

_CHUNK = 1024
"""Rows that are widened to float64 at a time, so that large factors are never held twice."""


class Truncated(NamedTuple):
    """A factored matrix at a lower rank, and what that costs."""

    factors: Factors
    """Balanced (``sqrt(S)`` on both sides), in the dtype of the matrix."""
    share: float
    """The dropped share of the Frobenius norm, ``|x - result| / |x|``, between 0 and 1."""
    norm: float
    """``|x|``, the norm of the whole matrix."""


def svd(x: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of ``x.B @ x.A``, in float64.

    Returns:
        ``U (d_out, q)``, ``S (q,)`` descending and ``Vh (q, d_in)``, with
        ``q = min(rank, d_out, d_in)``.

    >>> u, s, vh = svd(Factors(torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2)))
    >>> s
    tensor([4., 3.], dtype=torch.float64)
    """
    wide = x.to(torch.float64)
    q_b, r_b = torch.linalg.qr(wide.B)
    q_a, r_a = torch.linalg.qr(wide.A.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def truncate(x: Factors, rank: int) -> Truncated:
    """The best approximation of rank ``rank`` (Eckart-Young).

    Args:
        x: the factored matrix; not written.
        rank: how many singular values to keep, at least 0.

    Raises:
        ValueError: if ``rank`` is negative.

    >>> kept = truncate(Factors(torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2)), rank=1)
    >>> kept.factors.rank, round(kept.share, 6)  # |3| of |(3, 4)| is dropped
    (1, 0.6)
    """
    if rank < 0:
        raise ValueError(f"expected a rank of at least 0, found {rank}")
    return _truncated(x, Core(triangle(x.B), triangle(x.A.T)).maps(rank))


def truncate_share(x: Factors, share: float) -> Truncated:
    """The approximation of lowest rank that drops at most ``share`` of the Frobenius norm.

    Args:
        x: the factored matrix; not written.
        share: the largest ``|x - result| / |x|``, at least 0 and below 1.

    Raises:
        ValueError: if ``share`` is out of range.

    >>> x = Factors(torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2))
    >>> [truncate_share(x, share).factors.rank for share in (0.5, 0.7)]
    [2, 1]
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"expected a share of at least 0 and below 1, found {share}")
    core = Core(triangle(x.B), triangle(x.A.T))
    return _truncated(x, core.maps(core.rank_within(share)))


def compact(x: Factors) -> Factors:
    """The same matrix at its numerical rank: at most :data:`LOSSLESS` of its norm is left out.

    Returns:
        Balanced factors in the dtype of ``x``, of rank at most ``min(rank, d_out, d_in)``.

    >>> once = Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [1.0]]))
    >>> twice = Factors(torch.cat([once.A, once.A]), torch.cat([once.B, once.B], dim=1))
    >>> compact(twice).rank
    1
    """
    return truncate_share(x, LOSSLESS).factors


class Maps(NamedTuple):
    """What turns factors ``A (n, d_in)``, ``B (d_out, n)`` into those of a lower rank ``q``."""

    up: Tensor
    """``(n, q)``, float64: ``B' = B @ up``."""
    down: Tensor
    """``(q, n)``, float64: ``A' = down @ A``."""
    share: float
    """The dropped share of the Frobenius norm."""
    norm: float
    """The norm of the whole."""


class Core:
    """The decomposition ``R_B R_A^T = U S V^T`` of a product's core.

    Neither ``Q`` is formed: ``Q_B U S = B (R_A^T V)`` and ``S V^T Q_A^T = (U^T R_B) A``, so the
    balanced factors are products of the given ones, and the only large matrices are those and
    the result. With ``e`` the rounding of ``B A`` itself, a direction's product is off by
    ``e^2 / s``; directions of ``s < e``, which are nothing but rounding, are left out.

    Args:
        r_b: the triangle of ``B``, float64.
        r_a: the triangle of ``A^T``, float64.
    """

    def __init__(self, r_b: Tensor, r_a: Tensor) -> None:
        self._r_b, self._r_a = r_b, r_a
        self._u, self._s, self._vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)

    @property
    def norm(self) -> float:
        """Frobenius norm of ``B A``."""
        return float(self._s.norm())

    def rank_within(self, share: float) -> int:
        """The lowest rank that drops at most ``share`` of the norm."""
        # Sums from the small end, which a large first singular value would otherwise round away.
        tails = self._s.square().flip(0).cumsum(0).flip(0)
        return int((tails > share**2 * tails[:1]).sum())

    def maps(self, rank: int) -> Maps:
        """What leads to the first ``rank`` directions."""
        rounding = torch.finfo(torch.float64).eps * self._r_b.norm() * self._r_a.norm()
        rank = min(rank, int((self._s > rounding).sum()))
        root = self._s[:rank].sqrt()
        return Maps(
            up=self._r_a.T @ (self._vh[:rank].T / root),
            down=(self._u[:, :rank] / root).T @ self._r_b,
            share=float(self._s[rank:].norm()) / (self.norm or 1.0),
            norm=self.norm,
        )


def triangle(tall: Tensor) -> Tensor:
    """``R`` of a QR decomposition, in float64, from the triangles of groups of rows."""
    found = tall[:0].double()
    for rows in torch.split(tall, max(_CHUNK, tall.shape[1])):
        found = torch.linalg.qr(torch.cat([found, rows.double()]), mode="r").R
    return found


def _truncated(x: Factors, maps: Maps) -> Truncated:
    low = Factors(from_left(maps.down, x.A), from_right(x.B, maps.up))
    return Truncated(low, maps.share, maps.norm)


def from_left(small: Tensor, wide: Tensor) -> Tensor:
    """``small @ wide`` in float64, rounded to the dtype of ``wide``, which is widened in pieces."""
    out = wide.new_empty(small.shape[0], wide.shape[1])
    for start in range(0, wide.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        out[:, part] = small @ wide[:, part].double()
    return out


def from_right(tall: Tensor, small: Tensor) -> Tensor:
    """``tall @ small`` in float64, rounded to the dtype of ``tall``, which is widened in pieces."""
    out = tall.new_empty(tall.shape[0], small.shape[1])
    for start in range(0, tall.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = tall[part].double() @ small
    return out


def balanced(u: Tensor, s: Tensor, vh: Tensor, dtype: torch.dtype) -> Factors:
    """``U diag(S) Vh`` with ``sqrt(S)`` on both sides, so that neither factor is the large one."""
    root = s.sqrt()
    return Factors((root[:, None] * vh).to(dtype).contiguous(), (u * root).to(dtype).contiguous())
