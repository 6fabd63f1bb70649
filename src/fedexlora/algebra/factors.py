"""A low-rank matrix by its two factors, ``B @ A``, and its norms from small Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 64
"""The rank up to which a Gram matrix is multiplied whole."""


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's pair of factors; the unscaled update is ``B @ A``.

    Raises:
        ValueError: if the two are not matrices with the same rank, dtype and device.

    >>> pair = Factors(A=torch.tensor([[1.0, 2.0, 3.0]]), B=torch.tensor([[1.0], [2.0]]))
    >>> pair.rank, pair.shape
    (1, (2, 3))
    >>> pair.product()
    tensor([[1., 2., 3.],
            [2., 4., 6.]])
    """

    A: Tensor
    """Down-projection, ``(r, d_in)``, floating point."""
    B: Tensor
    """Up-projection, ``(d_out, r)``, of the same dtype and on the same device."""

    def __post_init__(self) -> None:
        a, b = self.A, self.B
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"expected A (r, d_in) and B (d_out, r), "
                f"found A {tuple(a.shape)} and B {tuple(b.shape)}"
            )
        if a.dtype != b.dtype or a.device != b.device or not a.dtype.is_floating_point:
            raise ValueError(
                f"expected A and B of one floating dtype on one device, "
                f"found A {a.dtype} on {a.device} and B {b.dtype} on {b.device}"
            )

    @property
    def rank(self) -> int:
        """Number of columns of ``B``: an upper bound of the rank of ``B @ A``."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of ``B @ A``."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both factors."""
        return self.A.dtype

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in ``dtype``."""
        return Factors(self.A.to(dtype), self.B.to(dtype))

    def on(self, device: torch.device) -> Factors:
        """The same factors on a device."""
        return Factors(self.A.to(device), self.B.to(device))

    def scaled(self, factor: float) -> Factors:
        """The factors of ``factor * B @ A``."""
        return self if factor == 1.0 else Factors(self.A, factor * self.B)

    def padded(self, rank: int) -> Factors:
        """The same product at a rank that is not lower, by zeros.

        Raises:
            ValueError: if ``rank`` is lower than that of the factors.
        """
        more = rank - self.rank
        if more < 0:
            raise ValueError(f"expected a rank of at least {self.rank}, found {rank}")
        if more == 0:
            return self
        pad = torch.nn.functional.pad
        return Factors(pad(self.A, (0, 0, 0, more)), pad(self.B, (0, more)))

    def first(self, rank: int) -> Factors:
        """The first ``rank`` rows of ``A`` and columns of ``B``; all if there are not more."""
        return Factors(self.A[:rank].contiguous(), self.B[:, :rank].contiguous())

    def product(self) -> Tensor:
        """``B @ A``, ``(d_out, d_in)``, in the dtype of the factors."""
        return self.B @ self.A

    @staticmethod
    def empty(d_out: int, d_in: int, dtype: torch.dtype) -> Factors:
        """The zero matrix ``(d_out, d_in)`` as factors of rank 0."""
        return Factors(torch.zeros(0, d_in, dtype=dtype), torch.zeros(d_out, 0, dtype=dtype))


class Sizes(NamedTuple):
    """Norms of the two factors, float64."""

    A: float
    """Frobenius."""
    B: float
    A_spectral: float
    """The largest singular value."""
    B_spectral: float


def sizes(x: Factors) -> Sizes:
    """Norms of both factors, from their rank by rank Gram matrices.

    >>> sizes(Factors(A=torch.diag(torch.tensor([3.0, 4.0])), B=torch.eye(2))).A
    5.0
    """
    a, b = x.A.double(), x.B.double()
    found = [torch.linalg.eigvalsh(gram).clamp(min=0.0) for gram in (a @ a.T, b.T @ b)]
    whole = [float(values.sum().sqrt()) for values in found]
    largest = [float(values[-1].sqrt()) for values in found]
    return Sizes(*whole, *largest)


def inner(x: Factors, y: Factors) -> float:
    """Frobenius inner product of ``x.B @ x.A`` and ``y.B @ y.A``, in float64.

    ``<B A, D C> = sum((B^T D) * (A C^T))``: two Gram matrices of size rank by rank.

    >>> x, y = (Factors(torch.full((1, 3), value), torch.ones(2, 1)) for value in (2.0, 5.0))
    >>> inner(x, y), float((x.product() * y.product()).sum())
    (60.0, 60.0)
    """
    xd, yd = x.to(torch.float64), y.to(torch.float64)
    return float(((xd.B.T @ yd.B) * (xd.A @ yd.A.T)).sum())


def squared_norm(x: Factors) -> float:
    """Squared Frobenius norm of ``x.B @ x.A``, in float64; rounding below zero is cut off.

    >>> squared_norm(Factors(torch.full((1, 3), 2.0), torch.ones(2, 1)))
    24.0
    """
    return max(_squared(x.to(torch.float64)), 0.0)


def _squared(x: Factors) -> float:
    """The squared norm of a sum of two halves, whose Gram matrix is symmetric: about half of it."""
    if x.rank <= _BLOCK:
        return inner(x, x)
    half = x.rank // 2
    one, other = Factors(x.A[:half], x.B[:, :half]), Factors(x.A[half:], x.B[:, half:])
    return _squared(one) + 2.0 * inner(one, other) + _squared(other)
