"""Sums of low-rank matrices over many rounds: their rank, their form, and no drift."""

from __future__ import annotations

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, break_even
from fedexlora.algebra.product import LOSSLESS

D_OUT, D_IN = 40, 90


def piece(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, D_IN, generator=generator)
    return LowRank(Factors(a, torch.randn(D_OUT, rank, generator=generator)).to(dtype))


def negative(x: LowRank) -> LowRank:
    return LowRank(x.value.scaled(-1.0))


def total(pieces: list[LowRank]) -> LowRank:
    held = LowRank.zeros(D_OUT, D_IN, torch.float64)
    for part in pieces:
        held = held.accumulate(part)
    return held


@pytest.mark.parametrize(("d_out", "d_in"), [(40, 90), (7, 7), (1, 50), (4096, 4096)])
def test_break_even_is_where_factors_stop_being_smaller(d_out, d_in):
    rank = break_even(d_out, d_in)
    assert rank * (d_out + d_in) >= d_out * d_in
    assert (rank - 1) * (d_out + d_in) < d_out * d_in


@pytest.mark.parametrize("rounds", [1, 3, 8, 30])
def test_a_total_is_the_sum_of_its_pieces_in_either_form(rounds):
    pieces = [piece(3, seed) for seed in range(rounds)]
    held = total(pieces)
    expected = sum(part.dense() for part in pieces)
    assert float((held.dense() - expected).norm()) <= 10 * LOSSLESS * float(expected.norm())
    assert isinstance(held.value, Factors) == (3 * rounds < break_even(D_OUT, D_IN))
    assert held.value.dtype == torch.float64


def test_a_total_whose_pieces_cancel_stays_at_the_rank_that_it_has():
    first = piece(4, 0)
    pieces = [first]
    for seed in range(1, 40):
        pieces += [negative(pieces[-1]), piece(4, seed)]
    held = total(pieces)
    expected = pieces[-1].dense()
    assert isinstance(held.value, Factors)
    assert held.value.rank <= 16
    assert float((held.dense() - expected).norm()) <= 1e-7 * float(expected.norm())


def test_a_zero_piece_changes_nothing_and_no_input_is_written():
    held = total([piece(3, 0)])
    copy = held.dense().clone()
    assert held.accumulate(LowRank.zeros(D_OUT, D_IN, torch.float32)) is held
    held.accumulate(piece(3, 1))
    assert torch.equal(held.dense(), copy)


def test_dense_pieces_make_a_dense_total():
    held = total([piece(2, 0), LowRank(piece(2, 1).dense(torch.float32))])
    assert isinstance(held.value, torch.Tensor)
    assert held.value.dtype == torch.float64
