"""Properties that every row of the table of methods, and every next adapter, must have."""

from __future__ import annotations

import pytest
import torch

from fedexlora.algebra import assignment
from fedexlora.algebra.assignment import Holder
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.algebra.moments import Moments
from fedexlora.methods import METHODS, Method
from fedexlora.methods.options import NEXT_ADAPTERS, option_faults, with_options

D_OUT, D_IN, RANK = 19, 31, 3
WEIGHTS = (1.0, 2.0, 5.0)
CHOICES = METHODS | {
    f"fedex-{name}": with_options(METHODS["fedex"], name, None, None)
    for name in NEXT_ADAPTERS
    if name != "mean"
}

every_method = pytest.mark.parametrize("method", CHOICES.values(), ids=CHOICES.keys())


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def holder(rank: int = RANK) -> Holder:
    previous = Factors(draw(rank, D_IN, seed=70), draw(D_OUT, rank, seed=71))
    return Holder(
        rank, previous, lambda: Factors(draw(rank, D_IN, seed=72), torch.zeros(D_OUT, rank))
    )


def clients(method: Method, count: int = 3) -> list[Factors]:
    """Clients as the method makes them: a factor that it freezes is the same for all."""
    a, b = draw(RANK, D_IN, seed=1), draw(D_OUT, RANK, seed=2)
    return [
        Factors(
            draw(RANK, D_IN, seed=10 + i) if "A" in method.trained else a,
            draw(D_OUT, RANK, seed=20 + i) if "B" in method.trained else b,
        )
        for i in range(count)
    ]


def moments(factors: list[Factors], weights: tuple[float, ...] = WEIGHTS) -> Moments:
    result = Moments.of(factors[0], weights[0])
    for pair, weight in zip(factors[1:], weights[1:], strict=False):
        result = result.add(pair, weight)
    return result


def aggregate(
    method: Method, factors: list[Factors], weights: tuple[float, ...] = WEIGHTS, rank: int = RANK
) -> tuple[Factors, LowRank]:
    sums = moments(factors, weights)
    adapter = method.assignment(sums, holder(rank))
    return adapter, method.remainder(assignment.remainder(sums, adapter))[0]


def applied(result: tuple[Factors, LowRank]) -> torch.Tensor:
    adapter, remainder = result
    return adapter.to(torch.float32).to(torch.float64).product() + remainder.dense()


def ideal(factors: list[Factors]) -> torch.Tensor:
    used = WEIGHTS[: len(factors)]
    return sum(
        (w / sum(used)) * (f.B.double() @ f.A.double()) for f, w in zip(factors, used, strict=True)
    )


def relative_error(method: Method, factors: list[Factors], rank: int = RANK) -> float:
    truth = ideal(factors)
    return float((applied(aggregate(method, factors, rank=rank)) - truth).norm() / truth.norm())


@every_method
def test_adapter_plus_remainder_is_the_ideal_where_the_method_says_so(method):
    error = relative_error(method, clients(method))
    if method.exact:
        assert error <= 1e-6
    else:
        assert error > 1e-2, "a method that is exact should say so"


@pytest.mark.parametrize("name", NEXT_ADAPTERS)
@pytest.mark.parametrize("rank", [1, 2, 5, 12])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_every_next_adapter_is_exact_at_every_rank_of_its_holder(name, rank, count):
    method = with_options(METHODS["fedex"], name, None, None)
    factors = clients(method, count)
    weights = tuple(float(i + 1) for i in range(count))
    result = aggregate(method, factors, weights, rank)
    truth = sum(w * (f.B.double() @ f.A.double()) for f, w in zip(factors, weights, strict=True))
    truth = truth / sum(weights)
    assert result[0].rank == rank
    assert float((applied(result) - truth).norm() / truth.norm()) <= 1e-6
    # A row of A and a column of B that are both zero would never be trained.
    assert ((result[0].A.norm(dim=1) > 0) | (result[0].B.norm(dim=0) > 0)).all()


@every_method
def test_one_client_gets_its_own_update_back(method):
    (client,) = clients(method, 1)
    difference = applied(aggregate(method, [client])) - client.to(torch.float64).product()
    assert difference.norm() <= 1e-6 * (client.B @ client.A).norm()
    if method.assignment is assignment.mean:
        assert aggregate(method, [client])[1].is_zero


@every_method
def test_equal_clients_leave_no_residual(method):
    (client,) = clients(method, 1)
    if method.assignment is assignment.mean:
        assert aggregate(method, [client] * 3)[1].squared_norm() == 0.0


@every_method
def test_factors_that_are_frozen_come_back_bit_for_bit(method):
    factors = clients(method)
    got = aggregate(method, factors)[0].to(torch.float32)
    if "A" not in method.trained:
        assert torch.equal(got.A, factors[0].A)
    if "B" not in method.trained:
        assert torch.equal(got.B, factors[0].B)


@every_method
def test_shapes_dtypes_and_inputs(method):
    factors = clients(method)
    copies = [(f.A.clone(), f.B.clone()) for f in factors]
    adapter, remainder = aggregate(method, factors)
    assert adapter.shape == remainder.shape == (D_OUT, D_IN)
    assert remainder.value.dtype == torch.float32
    for pair, (a, b) in zip(factors, copies, strict=True):
        assert torch.equal(pair.A, a)
        assert torch.equal(pair.B, b)


@every_method
def test_the_order_of_clients_moves_only_last_bits(method):
    factors = clients(method)
    one, other = (applied(aggregate(method, factors[::turn], WEIGHTS[::turn])) for turn in (1, -1))
    assert (one - other).norm() <= 1e-6 * one.norm()


def test_the_best_adapter_is_the_dense_optimum_and_balanced():
    factors = clients(METHODS["fedex"])
    found = assignment.best(moments(factors), holder())
    u, s, vh = torch.linalg.svd(ideal(factors))
    optimum = u[:, :RANK] * s[:RANK] @ vh[:RANK]
    torch.testing.assert_close(found.product(), optimum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.A @ found.A.T, found.B.T @ found.B, rtol=1e-8, atol=1e-8)


def test_alignment_changes_the_factors_and_not_their_product_and_is_the_nearest_turn():
    sums, whom = moments(clients(METHODS["fedex"])), holder()
    plain, turned = assignment.best(sums, whom), assignment.best_aligned(sums, whom)
    torch.testing.assert_close(turned.product(), plain.product(), rtol=1e-9, atol=1e-9)

    def distance(x: Factors) -> float:
        return float((x.A - whom.previous.A).norm() ** 2 + (x.B - whom.previous.B).norm() ** 2)

    assert distance(turned) < distance(plain)
    for seed in range(20):
        turn, _ = torch.linalg.qr(draw(RANK, RANK, seed=seed).double())
        assert distance(turned) <= distance(Factors(turn.T @ plain.A, plain.B @ turn)) + 1e-9


def test_the_remainder_of_the_best_adapter_has_the_rank_that_is_left():
    sums = moments(clients(METHODS["fedex"]))
    remainder = assignment.remainder(sums, assignment.best(sums, holder()))
    assert remainder.value.rank == 3 * RANK - RANK


@pytest.mark.parametrize("rank", [1, 4])
def test_a_truncated_remainder_is_off_by_what_it_states(rank):
    method = with_options(METHODS["fedex"], "mean", rank, None)
    assert not method.exact
    assert method.certified
    sums = moments(clients(method))
    whole = assignment.remainder(sums, sums.mean)
    kept, lacks = method.remainder(whole)
    assert kept.value.rank == rank
    assert float((whole.dense() - kept.dense()).norm()) == pytest.approx(lacks, rel=1e-6)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("dense", [False, True])
def test_energy_keeps_at_least_its_share(energy, dense):
    method = with_options(METHODS["fedex"], "mean", None, energy)
    sums = moments(clients(method))
    whole = assignment.remainder(sums, sums.mean)
    if dense:
        whole = LowRank(whole.dense(torch.float32))
    kept, lacks = method.remainder(whole)
    assert kept.squared_norm() >= (energy - 1e-6) * whole.squared_norm()
    # Norms of the two sides are float32 and float64 sums.
    difference = float((whole.dense() - kept.dense()).norm())
    assert difference == pytest.approx(lacks, rel=1e-5, abs=1e-5)


def test_options_that_a_method_does_not_have_are_all_named():
    faults = option_faults(METHODS["fedit"], "svd", 4, 0.5)
    assert len(faults) == 4
    assert faults[0].startswith("federation.next_adapter: fedit has no such choice")
    with pytest.raises(ValueError, match="not both"):
        with_options(METHODS["fedex"], "svd", 4, 0.5)


@pytest.mark.parametrize("name", METHODS)
def test_every_row_says_what_people_ask(name):
    method = METHODS[name]
    assert method.name == name
    assert method.paper
    assert method.title
    assert method.sends
    assert method.keeps
    assert set(method.trained) <= {"A", "B"}
