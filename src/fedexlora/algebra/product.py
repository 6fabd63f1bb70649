"""Singular values, truncation and compaction of a factored matrix, by thin QR.

With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, ``B A = Q_B (R_B R_A^T) Q_A^T``: the singular values
are those of a core of size rank by rank, and no dense matrix is ever formed or decomposed.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors


def svd(x: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of ``x.B @ x.A``, in float64.

    Returns:
        ``U (d_out, q)``, ``S (q,)`` descending and ``Vh (q, d_in)``, with
        ``q = min(rank, d_out, d_in)``.
    """
    wide = x.to(torch.float64)
    q_b, r_b = torch.linalg.qr(wide.B)
    q_a, r_a = torch.linalg.qr(wide.A.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


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
    total, dropped = float(s.square().sum()), float(s[rank:].square().sum())
    share = sqrt(dropped / total) if total > 0.0 else 0.0
    return _balanced(u[:, :rank], s[:rank], vh[:rank], x.dtype), share


def compact(x: Factors) -> Factors:
    """The same matrix at its numerical rank: only what float64 rounding made is left out.

    Returns:
        Balanced factors in the dtype of ``x``, of rank at most ``min(rank, d_out, d_in)``.
    """
    u, s, vh = svd(x)
    floor = float(s[0]) * max(x.shape) * torch.finfo(torch.float64).eps if len(s) else 0.0
    keep = int((s > floor).sum())
    return _balanced(u[:, :keep], s[:keep], vh[:keep], x.dtype)


def _balanced(u: Tensor, s: Tensor, vh: Tensor, dtype: torch.dtype) -> Factors:
    root = s.sqrt()
    return Factors((root[:, None] * vh).to(dtype).contiguous(), (u * root).to(dtype).contiguous())
