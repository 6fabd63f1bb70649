"""The rules of single methods, each on small numbers by a formula of its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fedexlora.algebra.assignment import Holder
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.methods import METHODS, Rule
from fedexlora.methods.fedrot import turn
from fedexlora.methods.rule import ClientRound, ModuleRound, ModuleStep, Trainables

M, N, R = 11, 17, 3
WEIGHTS = (1.0, 2.0, 5.0)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(seed: int, rank: int = R) -> Factors:
    return Factors(draw(rank, N, seed=seed), draw(M, rank, seed=seed + 1000))


def dense(factors: Factors) -> np.ndarray:
    return factors.B.double().numpy() @ factors.A.double().numpy()


def server_round(
    rule: Rule, round_: int, clients: list[Factors], before: Factors, memory: dict | None = None
) -> ModuleStep:
    def read() -> Iterator[tuple[Factors, float]]:
        return zip(clients, WEIGHTS, strict=True)

    module = ModuleRound(
        name="m",
        round=round_,
        scaling=1.5,
        clients=read,
        holder=Holder(R, before, lambda: before),
        owners={},
        offset=LowRank.zeros(M, N, torch.float64),
        memory=memory or {},
    )
    return rule.server(module)


def mean(clients: list[Factors]) -> np.ndarray:
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    return sum(p * dense(c) for p, c in zip(shares, clients, strict=True))


@pytest.mark.parametrize(("momentum", "rate"), [(0.9, 1.0), (0.5, 0.3), (0.0, 2.0)])
def test_momentum_is_that_of_the_exact_change_in_the_space_of_products(momentum, rate):
    options = {"momentum": momentum, "rate": rate, "momentum_rank": 200}
    rule = METHODS["fedavgm"].rule_of(options)
    adapter, memory = pair(1), {}
    model, velocity = dense(adapter), np.zeros((M, N))
    total = np.zeros((M, N))
    for round_ in range(1, 5):
        clients = [pair(10 * round_ + i) for i in range(3)]
        velocity = momentum * velocity + mean(clients) - dense(adapter)
        model = model + rate * velocity
        step = server_round(rule, round_, clients, adapter, memory)
        total = total + step.remainder.dense().numpy()
        adapter, memory = step.adapter, step.memory
        assert np.linalg.norm(dense(adapter) + total - model) <= 1e-6 * np.linalg.norm(model)
        assert step.memory_error <= 1e-6 * np.linalg.norm(velocity)


def test_a_momentum_of_few_directions_is_off_by_what_it_states():
    rule = METHODS["fedavgm"].rule_of({"momentum_rank": 2})
    clients, before = [pair(i) for i in range(3)], pair(9)
    step = server_round(rule, 1, clients, before)
    whole = mean(clients) - dense(before)
    kept = step.memory["B"].double().numpy() @ step.memory["A"].double().numpy()
    assert step.memory["A"].shape == (2, N)
    assert np.linalg.norm(whole - kept) == pytest.approx(step.memory_error, rel=1e-6)
    s = np.linalg.svd(whole, compute_uv=False)
    assert step.memory_error == pytest.approx(np.linalg.norm(s[2:]), rel=1e-6)


def test_without_momentum_the_step_is_that_of_fedex_bit_for_bit():
    clients, before = [pair(i) for i in range(3)], pair(9)
    plain = server_round(METHODS["fedex"].default, 1, clients, before)
    rule = METHODS["fedavgm"].rule_of({"momentum": 0.0})
    assert rule.exact
    step = server_round(rule, 1, clients, before)
    assert torch.equal(step.adapter.A, plain.adapter.A)
    assert torch.equal(step.adapter.B, plain.adapter.B)
    assert torch.equal(step.remainder.value.A, plain.remainder.value.A)
    assert torch.equal(step.remainder.value.B, plain.remainder.value.B)
    assert step.memory == {}


def test_the_halves_of_rolora_take_turns_and_b_comes_first():
    rule = METHODS["rolora"].default
    assert [rule.trains(t) for t in (1, 2, 3, 4)] == [("B",), ("A",), ("B",), ("A",)]
    assert rule.factors == ("A", "B")
    before = pair(3)
    for round_ in (1, 2):
        clients = [
            Factors(before.A, draw(M, R, seed=i))
            if round_ == 1
            else Factors(draw(R, N, seed=i), before.B)
            for i in range(3)
        ]
        step = server_round(rule, round_, clients, before)
        assert np.linalg.norm(dense(step.adapter) - mean(clients)) <= 1e-12 * np.linalg.norm(
            mean(clients)
        )
        assert step.remainder.is_zero


def entered(rule: Rule, received: Trainables, memory: dict, round_: int = 3) -> ClientRound:
    return ClientRound("a", round_, received, memory, lambda: received.factors)


@pytest.mark.parametrize("heads", ["local", "averaged"])
def test_fedsa_continues_from_the_mean_a_and_its_own_b(heads):
    rule = METHODS["fedsa"].rule_of({"heads": heads})
    assert rule.trains(1) == ("A", "B")
    assert rule.uploads(1) == ("A",)
    assert rule.personal
    received = Trainables({"m": pair(1)}, {"head": draw(2, 3, seed=5)})
    trained = Trainables({"m": pair(2)}, {"head": draw(2, 3, seed=6)})
    first = rule.client.enter(entered(rule, received, {}, 1))
    assert first.factors["m"].B is received.factors["m"].B
    sent, memory = rule.client.leave(entered(rule, received, {}), trained)
    assert sent.factors["m"] is trained.factors["m"]
    after = Trainables({"m": pair(7)}, {"head": draw(2, 3, seed=8)})
    start = rule.client.enter(entered(rule, after, memory))
    assert torch.equal(start.factors["m"].A, after.factors["m"].A)
    assert torch.equal(start.factors["m"].B, trained.factors["m"].B)
    kept = trained if heads == "local" else after
    assert torch.equal(start.heads["head"], kept.heads["head"])


def polar(cross: np.ndarray) -> np.ndarray:
    """The orthogonal factor of a polar decomposition, by Newton's iteration."""
    q = cross.copy()
    for _ in range(60):
        q = 0.5 * (q + np.linalg.inv(q).T)
    return q


@pytest.mark.parametrize("round_", [1, 2, 3, 4])
def test_the_hard_turn_is_the_orthogonal_procrustes_solution(round_):
    trained, received = pair(1), pair(2)
    found = turn(trained, received, round_, None)
    if round_ == 1:
        assert found is trained
        return
    a, b = (x.double().numpy() for x in (trained.A, trained.B))
    a_0, b_0 = (x.double().numpy() for x in (received.A, received.B))
    q = polar(a @ a_0.T) if round_ % 2 == 0 else polar(b.T @ b_0)
    np.testing.assert_allclose(found.A.double().numpy(), q.T @ a, atol=1e-5)
    np.testing.assert_allclose(found.B.double().numpy(), b @ q, atol=1e-5)
    np.testing.assert_allclose(dense(found), dense(trained), atol=1e-5)


def test_the_soft_turn_is_a_rotation_between_none_and_all():
    trained, received = pair(4), pair(5)
    a, a_0 = trained.A.double().numpy(), received.A.double().numpy()
    for strength in (0.0, 0.3, 1.0):
        found = turn(trained, received, 2, strength)
        q = np.linalg.lstsq(a.T, found.A.double().numpy().T, rcond=None)[0].T
        np.testing.assert_allclose(q @ q.T, np.eye(R), atol=1e-4)
        assert np.linalg.det(q) > 0
    assert turn(trained, received, 2, 0.0) is trained
    u, _, vt = np.linalg.svd(a @ a_0.T)
    if np.linalg.det(u @ vt) < 0:
        vt[-1] *= -1
    between = 0.7 * np.eye(R) + 0.3 * (u @ vt)
    u, _, vt = np.linalg.svd(between)
    found = turn(trained, received, 2, 0.3)
    np.testing.assert_allclose(found.A.double().numpy(), (u @ vt).T @ a, atol=1e-5)
    np.testing.assert_allclose(dense(found), dense(trained), atol=1e-5)


def test_a_client_turns_to_what_it_received_and_sends_its_own_product():
    rule = METHODS["fedrot"].default
    received = Trainables({"m": pair(1)}, {"head": draw(2, 3, seed=5)})
    trained = Trainables({"m": pair(2)}, {"head": draw(2, 3, seed=6)})
    sent, memory = rule.client.leave(entered(rule, received, {}, 2), trained)
    assert memory == {}
    distance = (sent.factors["m"].A - received.factors["m"].A).norm()
    assert distance < (trained.factors["m"].A - received.factors["m"].A).norm()
    np.testing.assert_allclose(dense(sent.factors["m"]), dense(trained.factors["m"]), atol=1e-5)
    assert sent.heads is trained.heads
