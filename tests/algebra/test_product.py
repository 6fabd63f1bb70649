"""Truncation and compaction against a dense singular value decomposition in float64."""

from __future__ import annotations

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.product import compact, svd, truncate, truncate_share

D_OUT, D_IN = 23, 37


def random_factors(rank: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rank, D_IN, generator=generator), torch.randn(D_OUT, rank, generator=generator)
    )


@pytest.mark.parametrize("rank", [1, 5, 23, 30, 60])
def test_singular_values_equal_the_dense_ones(rank):
    x = random_factors(rank)
    dense = x.B.double() @ x.A.double()
    u, s, vh = svd(x)
    expected = torch.linalg.svdvals(dense)[: len(s)]
    torch.testing.assert_close(s, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(u @ torch.diag(s) @ vh, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [0, 1, 3, 8, 50])
def test_truncation_is_optimal_and_says_what_it_dropped(rank):
    x = random_factors(8)
    dense = x.B.double() @ x.A.double()
    s = torch.linalg.svdvals(dense)
    low, dropped, _ = truncate(x, rank)
    error = (dense - low.B.double() @ low.A.double()).norm()
    optimal = s[rank:].norm()
    assert low.rank == min(rank, 8)
    assert low.dtype == x.dtype
    assert float(error) == pytest.approx(float(optimal), rel=1e-5, abs=1e-4)
    assert dropped == pytest.approx(float(optimal / s.norm()), rel=1e-9, abs=1e-12)


def test_truncation_balances_the_factors():
    low, _, _ = truncate(random_factors(8), 4)
    torch.testing.assert_close(low.A @ low.A.T, low.B.T @ low.B, rtol=1e-4, atol=1e-4)


def test_results_are_stored_row_by_row():
    """Bits of later products depend on the layout, and a message or checkpoint is contiguous."""
    low = compact(random_factors(8))
    assert low.A.is_contiguous()
    assert low.B.is_contiguous()


def test_truncation_refuses_a_negative_rank():
    with pytest.raises(ValueError, match="at least 0"):
        truncate(random_factors(3), -1)


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.1, 0.5, 0.999])
def test_a_share_is_kept_to_with_the_lowest_rank(share):
    x = random_factors(8)
    low, dropped, _ = truncate_share(x, share)
    assert dropped <= share
    if low.rank:
        assert truncate(x, low.rank - 1)[1] > share
    with pytest.raises(ValueError, match="below 1"):
        truncate_share(x, 1.0)


def test_compaction_loses_nothing_and_finds_the_rank():
    x = random_factors(4)
    doubled = Factors(torch.cat([x.A, 2 * x.A]).double(), torch.cat([x.B, -x.B], dim=1).double())
    small = compact(doubled)
    assert small.rank == 4
    torch.testing.assert_close(small.product(), doubled.product(), rtol=1e-10, atol=1e-10)


def test_compaction_of_zero_is_empty():
    assert compact(Factors(torch.zeros(3, D_IN), torch.zeros(D_OUT, 3))).rank == 0
    assert compact(Factors.empty(D_OUT, D_IN, torch.float32)).rank == 0


def test_inputs_are_not_written():
    x = random_factors(4)
    a, b = x.A.clone(), x.B.clone()
    truncate(x, 2)
    compact(x)
    assert torch.equal(x.A, a)
    assert torch.equal(x.B, b)
