"""Sums of products against dense float64 arithmetic."""

from __future__ import annotations

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.product_sum import ProductSum, Term

D_OUT, D_IN = 23, 37


def terms(ranks, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, rank in enumerate(ranks):
        a = torch.randn(rank, D_IN, generator=generator).to(dtype)
        b = torch.randn(D_OUT, rank, generator=generator).to(dtype)
        made.append(Term.of(Factors(a, b), (-1) ** i * (0.5 + i)))
    return made


def dense(parts):
    return sum(x.weight * x.read("B").double() @ x.read("A").double() for x in parts)


def relative(cut, wanted):
    found = cut.factors()
    return float((found.B.double() @ found.A.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ranks", [[3], [2, 5, 1], [4] * 5, [8] * 40, [30, 2], [2, 30, 30]])
def test_the_whole_sum_at_its_numerical_rank(ranks, dtype):
    parts = terms(ranks, dtype)
    total = ProductSum(D_OUT, D_IN, parts)
    wanted = dense(parts)
    assert total.norm == pytest.approx(float(wanted.norm()), rel=1e-9)
    assert total.within().rank == int(torch.linalg.matrix_rank(wanted))
    assert relative(total.within(), wanted) < (1e-9 if dtype == torch.float64 else 3e-7)


@pytest.mark.parametrize("rank", [1, 4, 9, 23, 99])
@pytest.mark.parametrize("ranks", [[2, 5, 4], [8] * 40])
def test_a_rank_is_cut_optimally(ranks, rank):
    parts = terms(ranks)
    wanted = dense(parts)
    s = torch.linalg.svdvals(wanted)
    cut = ProductSum(D_OUT, D_IN, parts).at_rank(rank)
    optimum = float(s[rank:].norm() / s.norm())
    assert cut.maps.share == pytest.approx(optimum, rel=1e-6, abs=1e-9)
    assert relative(cut, wanted) == pytest.approx(optimum, abs=1e-6)


def test_terms_that_cancel_leave_nothing():
    (part,) = terms([5])
    minus = Term(part.rank, -part.weight, part.read)
    total = ProductSum(D_OUT, D_IN, [part, minus])
    assert total.norm < 1e-12
    assert ProductSum(D_OUT, D_IN, []).within().rank == 0


def test_no_more_than_the_matrix_is_stacked():
    widths = []

    class Seen(ProductSum):
        def stacked(self, side):
            widths.append(super().stacked(side).shape)
            return super().stacked(side)

    total = Seen(D_OUT, D_IN, terms([8] * 100))
    total.within().factors()
    assert max(max(shape) for shape in widths) <= D_IN


def test_another_shape_is_refused():
    wrong = Term.of(Factors(torch.ones(2, D_IN + 1), torch.ones(D_OUT, 2)), 1.0)
    with pytest.raises(ValueError, match="expected A"):
        ProductSum(D_OUT, D_IN, [wrong]).within()
