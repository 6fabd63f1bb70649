"""Properties that every row of the table of methods must have."""

from __future__ import annotations

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.moments import Moments
from fedexlora.methods import METHODS, Method

D_OUT, D_IN, RANK = 19, 31, 3
WEIGHTS = (1.0, 2.0, 5.0)

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def clients(method: Method, count: int = 3) -> list[Factors]:
    """Clients as the method makes them: a factor that it freezes is the same for all."""
    generator = torch.Generator().manual_seed(5)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    a, b = draw(RANK, D_IN), draw(D_OUT, RANK)
    return [
        Factors(
            draw(RANK, D_IN) if "A" in method.trained else a,
            draw(D_OUT, RANK) if "B" in method.trained else b,
        )
        for _ in range(count)
    ]


def moments(factors: list[Factors], weights: tuple[float, ...] = WEIGHTS) -> Moments:
    result = Moments.of(factors[0], weights[0])
    for pair, weight in zip(factors[1:], weights[1:], strict=False):
        result = result.add(pair, weight)
    return result


def relative_error(method: Method, factors: list[Factors]) -> float:
    used = WEIGHTS[: len(factors)]
    ideal = sum(
        (w / sum(used)) * (f.B.double() @ f.A.double()) for f, w in zip(factors, used, strict=True)
    )
    got = method.aggregate(moments(factors))
    applied = got.adapter.B.double() @ got.adapter.A.double() + got.remainder.dense()
    return float((applied - ideal).norm() / ideal.norm())


@every_method
def test_adapter_plus_remainder_is_the_ideal_where_the_method_says_so(method):
    error = relative_error(method, clients(method))
    if method.exact:
        assert error <= 1e-6
    else:
        assert error > 1e-2, "a method that is exact should say so"


@every_method
def test_one_client_gets_its_own_update_back_and_no_remainder(method):
    (client,) = clients(method, 1)
    got = method.aggregate(moments([client]))
    assert got.remainder.is_zero
    difference = got.adapter.B @ got.adapter.A - client.B @ client.A
    assert difference.norm() <= 1e-6 * (client.B @ client.A).norm()


@every_method
def test_equal_clients_leave_no_remainder(method):
    (client,) = clients(method, 1)
    assert method.aggregate(moments([client] * 3)).remainder.squared_norm() == 0.0


@every_method
def test_factors_that_are_frozen_come_back_bit_for_bit(method):
    factors = clients(method)
    got = method.aggregate(moments(factors)).adapter
    if "A" not in method.trained:
        assert torch.equal(got.A, factors[0].A)
    if "B" not in method.trained:
        assert torch.equal(got.B, factors[0].B)


@every_method
def test_shapes_dtypes_and_inputs(method):
    factors = clients(method)
    copies = [(f.A.clone(), f.B.clone()) for f in factors]
    got = method.aggregate(moments(factors))
    assert got.adapter.shape == got.remainder.shape == (D_OUT, D_IN)
    assert got.adapter.dtype == got.remainder.value.dtype == torch.float32
    for pair, (a, b) in zip(factors, copies, strict=True):
        assert torch.equal(pair.A, a)
        assert torch.equal(pair.B, b)


@every_method
def test_the_order_of_clients_moves_only_last_bits(method):
    factors = clients(method)
    one = method.aggregate(moments(factors))
    other = method.aggregate(moments(factors[::-1], WEIGHTS[::-1]))
    total = one.adapter.product() + one.remainder.dense(torch.float32)
    difference = total - other.adapter.product() - other.remainder.dense(torch.float32)
    assert difference.norm() <= 1e-6 * total.norm()


@every_method
def test_every_row_says_what_people_ask(method):
    assert METHODS[method.name] is method
    assert method.paper
    assert method.title
    assert method.sends
    assert method.keeps
    assert set(method.trained) <= {"A", "B"}
