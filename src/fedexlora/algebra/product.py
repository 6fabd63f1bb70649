"""Singular values, truncation and compaction of a factored matrix, by thin QR.

With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, ``B A = Q_B (R_B R_A^T) Q_A^T``: the singular values
are those of a core of size rank by rank, and no dense matrix is ever formed or decomposed.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors

LOSSLESS = 2.0**-30
"""The share of a matrix's norm that compaction may leave out: 1/64 of a float32's rounding."""


def svd(x: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of ``x.B @ x.A``, in float64.

    Returns:
        ``U (d_out, q)``, ``S (q,)`` descending and ``Vh (q, d_in)``, with
        ``q = min(rank, d_out, d_in)``.
    """
    q_b, r_b, q_a, r_a = _thin(x)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def norm(x: Factors) -> float:
    """Frobenius norm of ``x.B @ x.A`` in float64, accurate even if its columns nearly cancel."""
    _, r_b, _, r_a = _thin(x)
    return float((r_b @ r_a.T).norm())


def truncate(x: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of rank ``rank`` (Eckart-Young), and the share that it drops.

    Args:
        x: the factored matrix; not written.
        rank: how many singular values to keep, at least 0.

    Returns:
        Balanced factors (``sqrt(S)`` on both sides) in the dtype of ``x``, and the dropped share
        of the Frobenius norm, ``|x - result| / |x|``, between 0 and 1.

    Raises:
        ValueError: if ``rank`` is negative.
    """
    if rank < 0:
        raise ValueError(f"expected a rank of at least 0, found {rank}")
    u, s, vh = svd(x)
    return _kept(u, s, vh, rank, x.dtype)


def truncate_share(x: Factors, share: float) -> tuple[Factors, float]:
    """The approximation of lowest rank that drops at most ``share`` of the Frobenius norm.

    Args:
        x: the factored matrix; not written.
        share: the largest ``|x - result| / |x|``, at least 0 and below 1.

    Returns:
        As :func:`truncate`.

    Raises:
        ValueError: if ``share`` is out of range.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"expected a share of at least 0 and below 1, found {share}")
    u, s, vh = svd(x)
    # Sums from the small end, which a large first singular value would otherwise round away.
    tails = s.square().flip(0).cumsum(0).flip(0)
    rank = int((tails > share**2 * tails[:1]).sum())
    return _kept(u, s, vh, rank, x.dtype)


def compact(x: Factors) -> Factors:
    """The same matrix at its numerical rank: at most :data:`LOSSLESS` of its norm is left out.

    Returns:
        Balanced factors in the dtype of ``x``, of rank at most ``min(rank, d_out, d_in)``.
    """
    return truncate_share(x, LOSSLESS)[0]


def _thin(x: Factors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = x.to(torch.float64)
    q_b, r_b = torch.linalg.qr(wide.B)
    q_a, r_a = torch.linalg.qr(wide.A.T)
    return q_b, r_b, q_a, r_a


def _kept(u: Tensor, s: Tensor, vh: Tensor, rank: int, dtype: torch.dtype) -> tuple[Factors, float]:
    total, dropped = float(s.square().sum()), float(s[rank:].square().sum())
    share = sqrt(dropped / total) if total > 0.0 else 0.0
    return balanced(u[:, :rank], s[:rank], vh[:rank], dtype), share


def balanced(u: Tensor, s: Tensor, vh: Tensor, dtype: torch.dtype) -> Factors:
    """``U diag(S) Vh`` with ``sqrt(S)`` on both sides, so that neither factor is the large one."""
    root = s.sqrt()
    return Factors((root[:, None] * vh).to(dtype).contiguous(), (u * root).to(dtype).contiguous())
