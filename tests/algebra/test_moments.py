"""The streamed co-moments against the naive float64 sums that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedexlora.algebra.deviation import deviation
from fedexlora.algebra.factors import Factors, inner, squared_norm
from fedexlora.algebra.lowrank import LowRank, stack
from fedexlora.algebra.moments import Moments

D_OUT, D_IN = 23, 37


def random_clients(
    count: int, rank: int, seed: int = 0, spread: float = 1.0, d_out: int = D_OUT, d_in: int = D_IN
) -> list[tuple[Factors, float]]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(s, generator=generator) for s in ((rank, d_in), (d_out, rank)))
    clients = []
    for i in range(count):
        da, db = (torch.randn(x.shape, generator=generator) for x in (a, b))
        clients.append((Factors(a + spread * da, b + spread * db), float(1 + 3 * i)))
    return clients


def naive_mean_product(clients: list[tuple[Factors, float]]) -> Tensor:
    total = sum(w for _, w in clients)
    return sum((w / total) * (f.B.double() @ f.A.double()) for f, w in clients)


def streamed(clients: list[tuple[Factors, float]]) -> Moments:
    moments = Moments.of(*clients[0])
    for factors, weight in clients[1:]:
        moments = moments.add(factors, weight)
    return moments


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 6),
    rank=st.integers(1, 5),
    d_out=st.integers(1, 30),
    d_in=st.integers(1, 30),
    seed=st.integers(0, 10_000),
)
def test_mean_factors_plus_residual_is_the_mean_product(count, rank, d_out, d_in, seed):
    clients = random_clients(count, rank, seed, d_out=d_out, d_in=d_in)
    moments = streamed(clients)
    found = moments.mean.product() + moments.residual().dense()
    ideal = naive_mean_product(clients)
    assert (found - ideal).norm() <= 1e-6 * ideal.norm()


def test_residual_is_factored_with_rank_k_minus_one_times_r_while_that_is_smaller():
    residual = streamed(random_clients(4, 2)).residual()
    assert isinstance(residual.value, Factors)
    assert residual.value.rank == 3 * 2
    assert torch.linalg.matrix_rank(residual.dense()) == 3 * 2


def test_residual_turns_dense_where_factors_would_be_larger_and_stays_right():
    clients = random_clients(30, 4)
    moments = streamed(clients)
    assert isinstance(moments.comoment.value, Tensor)
    assert moments.comoment.numel == D_OUT * D_IN
    ideal = naive_mean_product(clients)
    found = moments.mean.product() + moments.residual().dense()
    assert (found - ideal).norm() <= 1e-6 * ideal.norm()


def test_what_is_held_does_not_grow_with_the_clients():
    small, large = streamed(random_clients(20, 4)), streamed(random_clients(200, 4))
    assert large.comoment.numel == small.comoment.numel


def test_one_client_leaves_no_residual():
    moments = streamed(random_clients(1, 3))
    assert moments.residual().is_zero
    assert deviation(moments).relative == 0.0


def test_merging_two_partial_sums_equals_adding_one_by_one():
    clients = random_clients(7, 2)
    merged = streamed(clients[:3]).merge(streamed(clients[3:]))
    whole = streamed(clients)
    assert merged.weight == whole.weight
    torch.testing.assert_close(merged.mean.A, whole.mean.A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.mean.B, whole.mean.B, rtol=1e-12, atol=1e-12)
    difference = merged.residual().dense() - whole.residual().dense()
    assert difference.norm() <= 1e-6 * whole.residual().dense().norm()
    assert isinstance(merged.comoment.value, Factors)
    assert merged.comoment.value.rank == 6 * 2


def test_order_moves_only_last_bits():
    clients = random_clients(5, 3)
    one, other = streamed(clients).residual().dense(), streamed(clients[::-1]).residual().dense()
    assert (one - other).norm() <= 1e-6 * one.norm()


@pytest.mark.parametrize("spread", [1e-1, 1e-3])
def test_residual_survives_when_clients_hardly_differ(spread):
    clients = random_clients(3, 4, spread=spread)
    moments = streamed(clients)
    total = sum(w for _, w in clients)
    centred = sum(
        (w / total) * ((f.B.double() - moments.mean.B) @ (f.A.double() - moments.mean.A))
        for f, w in clients
    )
    assert (moments.residual().dense() - centred).norm() <= 1e-6 * centred.norm()


def test_clients_factors_are_not_written():
    clients = random_clients(3, 2)
    copies = [(f.A.clone(), f.B.clone()) for f, _ in clients]
    moments = streamed(clients)
    moments.merge(streamed(clients))
    for (factors, _), (a, b) in zip(clients, copies, strict=True):
        assert torch.equal(factors.A, a)
        assert torch.equal(factors.B, b)


def test_bfloat16_clients_are_summed_in_wider_arithmetic():
    clients = [(f.to(torch.bfloat16), w) for f, w in random_clients(3, 2)]
    moments = streamed(clients)
    ideal = naive_mean_product(clients)
    found = moments.mean.product() + moments.residual().dense()
    assert (found - ideal).norm() <= 1e-6 * ideal.norm()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_must_be_positive_and_finite(weight):
    factors = random_clients(1, 2)[0][0]
    with pytest.raises(ValueError, match="positive, finite weight"):
        Moments.of(factors, weight)
    with pytest.raises(ValueError, match="positive, finite weight"):
        Moments.of(factors, 1.0).add(factors, weight)


def test_factors_of_another_shape_are_refused_with_both_shapes():
    moments = Moments.of(*random_clients(1, 2)[0])
    with pytest.raises(ValueError, match=r"A \(2, 37\).*found A \(3, 37\)"):
        moments.add(random_clients(1, 3)[0][0], 1.0)


@pytest.mark.parametrize("count", [2, 3, 40])
def test_deviation_equals_the_dense_difference(count):
    clients = random_clients(count, 3)
    ideal = naive_mean_product(clients)
    moments = streamed(clients)
    found = deviation(moments)
    lost = (ideal - moments.mean.product()).norm()
    assert found.residual == pytest.approx(float(lost), rel=1e-5)
    assert found.ideal == pytest.approx(float(ideal.norm()), rel=1e-5)
    assert found.relative == pytest.approx(float(lost / ideal.norm()), rel=1e-5)


def test_gram_norms_equal_dense_norms():
    (x, _), (y, _) = random_clients(2, 3)
    dense_x, dense_y = x.B.double() @ x.A.double(), y.B.double() @ y.A.double()
    assert inner(x, y) == pytest.approx(float((dense_x * dense_y).sum()), rel=1e-12)
    assert squared_norm(x) == pytest.approx(float(dense_x.square().sum()), rel=1e-12)


def test_a_sum_is_held_in_the_smaller_form_and_mixes_both():
    (x, _), (y, _) = random_clients(2, 3)
    factored = LowRank.zeros(D_OUT, D_IN, torch.float32).plus([x, y])
    assert isinstance(factored.value, Factors)
    mixed = factored.to(torch.float64).plus([torch.ones(D_OUT, D_IN)])
    assert isinstance(mixed.value, Tensor)
    expected = x.product().double() + y.product().double() + 1.0
    torch.testing.assert_close(mixed.value, expected, rtol=1e-5, atol=1e-5)
    assert mixed.inner(x) == pytest.approx(float((mixed.value * x.product().double()).sum()))
    with pytest.raises(ValueError, match="expected terms of"):
        factored.plus([torch.ones(D_IN, D_OUT)])


def test_stacking_leaves_out_empty_parts_but_keeps_the_shape():
    empty = Factors.empty(D_OUT, D_IN, torch.float32)
    assert stack([empty, empty]).shape == (D_OUT, D_IN)
    assert stack([empty, random_clients(1, 2)[0][0]]).rank == 2


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 3), torch.zeros(5, 3)),
        (torch.zeros(3), torch.zeros(5, 3)),
        (torch.zeros(2, 3), torch.zeros(5, 2, dtype=torch.float64)),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 2, dtype=torch.int64)),
    ],
)
def test_factors_that_do_not_fit_are_refused(a, b):
    with pytest.raises(ValueError, match="expected A"):
        Factors(a, b)


@pytest.mark.exactness
def test_the_error_does_not_grow_with_the_clients_where_the_sum_is_dense():
    def error(count: int) -> float:
        clients = random_clients(count, 4, d_out=60, d_in=50)
        moments, ideal = Moments.over(iter(clients)), naive_mean_product(clients)
        found = moments.mean.product() + moments.residual().dense()
        return float((found - ideal).norm() / ideal.norm())

    assert isinstance(
        Moments.over(random_clients(800, 4, d_out=60, d_in=50)).comoment.value, Tensor
    )
    assert error(800) < 3 * error(3) < 3e-7
