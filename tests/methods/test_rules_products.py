"""The rules of methods that factor or weigh products, each by a formula of its own in numpy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch

from fedexlora.algebra.assignment import Holder
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.methods import METHODS, Rule
from fedexlora.methods.rule import ClientRound, ModuleRound, ModuleStep, Trainables

M, N, R = 23, 37, 3
WEIGHTS = np.array([1.0, 2.0, 5.0])
SHARES = WEIGHTS / WEIGHTS.sum()
RANKS = (3, 1, 2)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(seed: int, rank: int = R, common: int = R) -> Factors:
    """Factors of a rank, padded to the common one as the round gets them."""
    return Factors(draw(rank, N, seed=seed), draw(M, rank, seed=seed + 1000)).padded(common)


def arrays(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    return factors.A.double().numpy(), factors.B.double().numpy()


def dense(factors: Factors) -> np.ndarray:
    a, b = arrays(factors)
    return b @ a


def mean(clients: list[Factors]) -> np.ndarray:
    return sum(p * dense(c) for p, c in zip(SHARES, clients, strict=True))


def holder(rank: int, seed: int = 900) -> Holder:
    def fresh() -> Factors:
        return Factors(draw(rank, N, seed=seed), torch.zeros(M, rank))

    return Holder(rank, pair(seed + 1, rank, rank), fresh)


def made(
    rule: Rule,
    clients: list[Factors],
    *,
    weights: np.ndarray = WEIGHTS,
    round_: int = 1,
    before: Factors | None = None,
    ranks: tuple[int, ...] = (),
    owners: Mapping[str, int] | None = None,
) -> ModuleStep:
    """What the server makes of one module; scalings are in the updates already."""

    def read() -> Iterator[tuple[Factors, float]]:
        return zip(clients, map(float, weights), strict=True)

    common = holder(R)
    if before is not None:
        common = Holder(R, before, common.fresh)
    return rule.server(
        ModuleRound(
            name="m",
            round=round_,
            scaling=2.5,
            clients=read,
            holder=common,
            owners={name: holder(rank, 800 + rank) for name, rank in (owners or {}).items()},
            offset=LowRank.zeros(M, N, torch.float64),
            ranks=ranks,
        )
    )


def applied(step: ModuleStep) -> np.ndarray:
    return dense(step.adapter) + step.remainder.dense().numpy()


def close(found: np.ndarray, truth: np.ndarray, tolerance: float = 1e-6) -> bool:
    return bool(np.linalg.norm(found - truth) <= tolerance * np.linalg.norm(truth))


def cut(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def directions(matrix: np.ndarray, energy: float) -> int:
    s = np.linalg.svd(matrix, compute_uv=False)
    return int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), energy) + 1)


MIXED = [pair(10 * i, rank) for i, rank in enumerate(RANKS)]
EQUAL = [pair(10 * i) for i in range(3)]


@pytest.mark.parametrize("clients", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("name", ["flora", "florist"])
def test_stacks_go_to_the_weight_and_adapters_start_anew(name, clients):
    options = {} if name == "flora" else {"energy": 1.0}
    rule = METHODS[name].rule_of(options)
    assert rule.exact
    assert rule.fresh_start
    step = made(rule, clients, owners={"a": 2})
    a = np.concatenate([p * arrays(c)[0] for p, c in zip(SHARES, clients, strict=True)])
    b = np.concatenate([arrays(c)[1] for c in clients], axis=1)
    assert close(step.remainder.dense().numpy(), b @ a)
    assert not step.adapter.B.any()
    assert torch.equal(step.adapter.A, holder(R).fresh().A.double())
    assert step.own["a"].rank == 2
    assert not step.own["a"].B.any()


def test_every_client_of_flora_starts_from_factors_of_its_own_in_every_round():
    received = Trainables({"m": pair(1)}, {"head": draw(2, 3, seed=5)})
    for name in ("flora", "florist"):
        rule = METHODS[name].default
        drawn = [
            rule.client.enter(
                ClientRound(client, round_, received, {}, lambda seed=seed: {"m": pair(seed)})
            )
            for seed, (client, round_) in enumerate([("a", 1), ("b", 1), ("a", 2)], 50)
        ]
        for seed, start in enumerate(drawn, 50):
            assert torch.equal(start.factors["m"].A, pair(seed).A)
            assert start.heads is received.heads


@pytest.mark.parametrize("clients", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("energy", [0.3, 0.7, 0.9, 0.999])
def test_florist_keeps_the_fewest_directions_of_an_energy_and_states_the_rest(energy, clients):
    rule = METHODS["florist"].rule_of({"energy": energy})
    assert not rule.exact
    assert rule.certified
    step, whole = made(rule, clients), mean(clients)
    count = directions(whole, energy)
    assert step.remainder.value.rank == count
    assert close(step.remainder.dense().numpy(), cut(whole, count))
    left_out = np.linalg.norm(whole - cut(whole, count))
    assert step.truncation.lacks == pytest.approx(left_out, rel=1e-5)


@pytest.mark.parametrize("clients", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_flexlora_hands_out_the_best_approximation_at_every_rank_with_its_values_in_b(clients):
    ranks = {"a": 1, "b": 2, "c": 5}
    step, whole = made(METHODS["flexlora"].default, clients, owners=ranks), mean(clients)
    s = np.linalg.svd(whole, compute_uv=False)
    found = {"": (step.adapter, R)} | {x: (step.own[x], rank) for x, rank in ranks.items()}
    for adapter, rank in found.values():
        a, b = arrays(adapter)
        assert a.shape == (rank, N)
        assert close(b @ a, cut(whole, rank))
        np.testing.assert_allclose(a @ a.T, np.eye(rank), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), s[:rank], rtol=1e-5)
    assert step.remainder.is_zero
    assert step.truncation.lacks == pytest.approx(np.linalg.norm(s[R:]), rel=1e-5)


def test_flexlora_fills_up_an_adapter_whose_rank_the_update_has_not():
    step = made(METHODS["flexlora"].default, [pair(4, 1)] * 3, owners={"a": 5})
    assert close(dense(step.own["a"]), dense(pair(4, 1)))
    assert (step.own["a"].A.norm(dim=1) > 0).all()


def test_rbla_averages_a_row_over_those_that_have_it():
    owners = {"b": 1, "c": 2}
    rule = METHODS["rbla"].default
    step = made(rule, MIXED, ranks=RANKS, owners=owners)
    a, b = np.zeros((R, N)), np.zeros((M, R))
    for j in range(R):
        having = [i for i, rank in enumerate(RANKS) if rank > j]
        whole = WEIGHTS[having].sum()
        a[j] = sum(WEIGHTS[i] / whole * arrays(MIXED[i])[0][j] for i in having)
        b[:, j] = sum(WEIGHTS[i] / whole * arrays(MIXED[i])[1][:, j] for i in having)
    np.testing.assert_allclose(arrays(step.adapter)[0], a, rtol=1e-12)
    np.testing.assert_allclose(arrays(step.adapter)[1], b, rtol=1e-12)
    for client, rank in owners.items():
        np.testing.assert_array_equal(arrays(step.own[client])[0], arrays(step.adapter)[0][:rank])
        np.testing.assert_array_equal(
            arrays(step.own[client])[1], arrays(step.adapter)[1][:, :rank]
        )
    assert step.remainder.is_zero


def test_a_row_that_nobody_in_the_round_has_stays():
    before = pair(77)
    found = made(
        METHODS["rbla"].default, MIXED[1:], weights=WEIGHTS[1:], before=before, ranks=(1, 2)
    )
    assert torch.equal(found.adapter.A[2], before.A[2].double())
    assert torch.equal(found.adapter.B[:, 2], before.B[:, 2].double())


@pytest.mark.parametrize("ranks", [(), (R, R, R)])
def test_rbla_of_equal_ranks_is_fedit(ranks):
    fedit = made(METHODS["fedit"].default, EQUAL)
    found = made(METHODS["rbla"].default, EQUAL, ranks=ranks)
    np.testing.assert_allclose(found.adapter.A, fedit.adapter.A, rtol=1e-12)
    np.testing.assert_allclose(found.adapter.B, fedit.adapter.B, rtol=1e-12)


@pytest.mark.parametrize("clients", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_hetlora_weighs_by_the_norms_of_products_and_not_by_rows(clients):
    owners = {"b": 1, "c": 2}
    rule = METHODS["hetlora"].default
    assert rule.weighs_clients
    step = made(rule, clients, owners=owners)
    q = np.array([np.linalg.norm(dense(c)) for c in clients])
    q /= q.sum()
    a = sum(x * arrays(c)[0] for x, c in zip(q, clients, strict=True))
    b = sum(x * arrays(c)[1] for x, c in zip(q, clients, strict=True))
    np.testing.assert_allclose(arrays(step.adapter)[0], a, rtol=1e-10)
    np.testing.assert_allclose(arrays(step.adapter)[1], b, rtol=1e-10)
    for client, rank in owners.items():
        np.testing.assert_array_equal(arrays(step.own[client])[0], arrays(step.adapter)[0][:rank])
    assert step.remainder.is_zero


def test_hetlora_of_equal_ranks_and_norms_is_fedit_with_equal_weights():
    clients = [Factors(c.A, c.B / (c.B @ c.A).norm()) for c in EQUAL]
    equal = np.ones(3)
    fedit = made(METHODS["fedit"].default, clients, weights=equal)
    found = made(METHODS["hetlora"].default, clients)
    np.testing.assert_allclose(found.adapter.A, fedit.adapter.A, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.adapter.B, fedit.adapter.B, rtol=1e-5, atol=1e-7)


def test_hetlora_of_products_that_are_all_zero_weighs_by_rows():
    clients = [Factors(c.A, torch.zeros_like(c.B)) for c in EQUAL]
    step = made(METHODS["hetlora"].default, clients)
    a = sum(p * arrays(c)[0] for p, c in zip(SHARES, clients, strict=True))
    np.testing.assert_allclose(arrays(step.adapter)[0], a, rtol=1e-12)


@pytest.mark.parametrize("clients", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("energy", [0.2, 0.9, 0.99, 1.0])
def test_fedmomentum_keeps_the_best_adapter_and_the_rest_up_to_an_energy(energy, clients):
    rule = METHODS["fedmomentum"].rule_of({"energy": energy})
    assert rule.exact == (energy == 1.0)
    step, whole = made(rule, clients), mean(clients)
    a, b = arrays(step.adapter)
    assert close(b @ a, cut(whole, R))
    np.testing.assert_allclose(a @ a.T, b.T @ b, atol=1e-6)
    count = max(directions(whole, energy), R) if energy < 1.0 else min(M, N)
    assert close(applied(step), cut(whole, count))
    assert step.adapter.rank == R, "also where fewer directions hold the energy"
    if energy == 1.0:
        assert step.truncation is None
        assert close(applied(step), whole)
    else:
        left_out = np.linalg.norm(whole - cut(whole, count))
        assert step.truncation.lacks == pytest.approx(left_out, rel=1e-4, abs=1e-6)


def test_fedmomentum_that_keeps_all_is_the_best_adapter_of_fedex_bit_for_bit():
    one = made(METHODS["fedmomentum"].rule_of({"energy": 1.0}), EQUAL, owners={"a": 2})
    other = made(METHODS["fedex"].rule_of({"next_adapter": "svd"}), EQUAL, owners={"a": 2})
    for found, wanted in ((one.adapter, other.adapter), (one.own["a"], other.own["a"])):
        assert torch.equal(found.A, wanted.A)
        assert torch.equal(found.B, wanted.B)
    assert torch.equal(one.remainder.value.A, other.remainder.value.A)


@pytest.mark.parametrize(("period", "turns"), [(1, {1, 2, 3, 4}), (3, {3})])
def test_fedsvd_factors_the_mean_product_anew_and_does_not_change_it(period, turns):
    rule = METHODS["fedsvd"].rule_of({"period": period})
    assert [rule.trains(t) for t in (1, 2)] == [("B",), ("B",)]
    assert rule.steps(1) == ("A", "B")
    before = pair(3)
    for round_ in range(1, 5):
        clients = [Factors(before.A, draw(M, R, seed=10 * round_ + i)) for i in range(3)]
        step, truth = made(rule, clients, round_=round_, before=before), mean(clients)
        b_mean = sum(p * arrays(c)[1] for p, c in zip(SHARES, clients, strict=True))
        assert close(dense(step.adapter), b_mean @ arrays(before)[0], 1e-12)
        assert close(dense(step.adapter), truth, 1e-12)
        assert step.remainder.is_zero
        a, b = arrays(step.adapter)
        if round_ in turns:
            s = np.linalg.svd(truth, compute_uv=False)[:R]
            np.testing.assert_allclose(a @ a.T, np.eye(R), atol=1e-12)
            np.testing.assert_allclose(b.T @ b, np.diag(s**2), atol=1e-10 * s[0] ** 2)
        else:
            np.testing.assert_allclose(a, arrays(before)[0], rtol=1e-12)
        before = step.adapter.to(torch.float32)


def test_fedsvd_leaves_an_a_alone_that_nothing_says_how_to_change():
    before = pair(3)
    clients = [Factors(before.A, torch.zeros(M, R))] * 3
    step = made(METHODS["fedsvd"].default, clients, before=before)
    assert torch.equal(step.adapter.A.float(), before.A)
    assert not step.adapter.B.any()


def test_fedsvd_keeps_a_rank_that_is_larger_than_a_side():
    common = Factors(draw(5, N, seed=1), draw(2, 5, seed=2))
    clients = [Factors(common.A, draw(2, 5, seed=i)) for i in range(3)]
    module = ModuleRound(
        name="m",
        round=1,
        scaling=2.5,
        clients=lambda: zip(clients, map(float, WEIGHTS), strict=True),
        holder=Holder(5, common, lambda: common),
        owners={},
        offset=LowRank.zeros(2, N, torch.float64),
    )
    adapter = METHODS["fedsvd"].default.server(module).adapter
    assert adapter.rank == 5
    assert close(dense(adapter), mean(clients), 1e-12)
    assert (adapter.A.norm(dim=1) > 0).all()
