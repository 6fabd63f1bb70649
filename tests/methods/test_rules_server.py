"""Rules of the server alone, each on small numbers by a formula of its own, and the references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.methods import METHODS
from fedexlora.methods.fedadam_factored import mean_squares
from fedexlora.methods.lorafair_ridge import correction
from fedexlora.methods.rule import Trainables
from fedexlora.peft_bridge.model import AdaptedModel
from tests.methods.test_rules import M, N, R, dense, draw, entered, mean, pair, server_round
from tests.models import adapted, base_of

SCALING = 1.5
"""That of the rounds of :func:`server_round`."""


@pytest.mark.parametrize(
    ("rate", "beta1", "beta2", "tau"),
    [(1e-3, 0.9, 0.99, 1e-3), (0.3, 0.5, 0.0, 2.0), (2.0, 0.0, 0.9, 0.5)],
)
def test_fedadam_divides_the_momentum_by_means_of_rows_and_columns(rate, beta1, beta2, tau):
    options = {"rate": rate, "beta1": beta1, "beta2": beta2, "tau": tau, "momentum_rank": 200}
    rule = METHODS["fedadam_factored"].rule_of(options)
    assert rule.certified
    assert not rule.exact
    adapter, memory = pair(1), {}
    model, momentum = SCALING * dense(adapter), np.zeros((M, N))
    second = np.zeros((M, N))
    total = np.zeros((M, N))
    for round_ in range(1, 5):
        clients = [pair(10 * round_ + i) for i in range(3)]
        change = SCALING * (mean(clients) - dense(adapter))
        momentum = beta1 * momentum + (1 - beta1) * change
        # Means are linear: those of the moving average are the moving averages of the means.
        second = beta2 * second + (1 - beta2) * change**2
        floored = second + tau**2
        u, c = floored.mean(1), floored.mean(0)
        model = model + rate * momentum / np.sqrt(np.outer(u, c) / u.mean())
        step = server_round(rule, round_, clients, adapter, memory)
        total = total + step.remainder.dense().numpy()
        adapter, memory = step.adapter, step.memory
        found = SCALING * (dense(adapter) + total)
        assert np.linalg.norm(found - model) <= 1e-6 * np.linalg.norm(model)
        np.testing.assert_allclose(memory["rows"].numpy(), second.mean(1), rtol=1e-5)
        np.testing.assert_allclose(memory["columns"].numpy(), second.mean(0), rtol=1e-5)
        assert ("A" in memory) == (beta1 > 0.0)
        assert step.memory_error <= 1e-6 * np.linalg.norm(momentum)


def test_changes_far_below_tau_are_all_multiplied_alike():
    rule = METHODS["fedadam_factored"].rule_of({"rate": 5e3, "beta1": 0.0, "tau": 1e4})
    clients, before = [pair(i) for i in range(3)], pair(9)
    step = server_round(rule, 1, clients, before)
    found = dense(step.adapter) + step.remainder.dense().numpy()
    wanted = dense(before) + 0.5 * (mean(clients) - dense(before))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_step_of_fedadam_has_the_rank_of_its_momentum():
    rule = METHODS["fedadam_factored"].rule_of({"momentum_rank": 2})
    clients, before = [pair(i) for i in range(3)], pair(9)
    step = server_round(rule, 1, clients, before)
    assert step.memory["A"].shape == (2, N)
    whole = 0.1 * (mean(clients) - dense(before))
    s = np.linalg.svd(whole, compute_uv=False)
    assert step.memory_error == pytest.approx(np.linalg.norm(s[2:]), rel=1e-5)


@pytest.mark.parametrize("form", ["factors", "dense"])
def test_means_of_squares_from_factors_are_those_of_the_matrix(form):
    x = pair(3)
    matrix = LowRank(x) if form == "factors" else LowRank(x.product())
    rows, columns = mean_squares(matrix)
    np.testing.assert_allclose(rows.numpy(), (dense(x) ** 2).mean(1), rtol=1e-6)
    np.testing.assert_allclose(columns.numpy(), (dense(x) ** 2).mean(0), rtol=1e-6)


@pytest.mark.parametrize("ridge", [1e-9, 0.01, 3.0])
def test_the_corrected_b_is_the_least_squares_solution_with_a_ridge(ridge):
    rule = METHODS["lorafair_ridge"].rule_of({"ridge": ridge})
    clients = [pair(i) for i in range(3)]
    step = server_round(rule, 1, clients, pair(9))
    shares = np.array([1, 2, 5]) / 8
    a, b = (
        sum(p * getattr(c, x).double().numpy() for p, c in zip(shares, clients, strict=True))
        for x in "AB"
    )
    # min |M - B A - dB A|^2 + ridge |dB|^2, with the ridge as rows of the system.
    system = np.vstack([a.T, np.sqrt(ridge) * np.eye(R)])
    wanted = np.vstack([(mean(clients) - b @ a).T, np.zeros((R, M))])
    moved = np.linalg.lstsq(system, wanted, rcond=None)[0].T
    np.testing.assert_allclose(step.adapter.A.numpy(), a, atol=1e-12)
    np.testing.assert_allclose(step.adapter.B.numpy(), b + moved, atol=1e-5)
    assert step.remainder.is_zero
    error = np.linalg.norm(mean(clients) - dense(step.adapter))
    assert error <= np.linalg.norm(mean(clients) - b @ a) + 1e-12


def test_a_correction_is_the_same_from_a_dense_residual():
    residual, factors = pair(1), pair(2).to(torch.float64)
    one = correction(LowRank(residual), factors, 0.1)
    other = correction(LowRank(residual.to(torch.float64).product()), factors, 0.1)
    torch.testing.assert_close(one, other)


def test_frlora_gives_the_weight_the_change_of_the_mean_factors_and_starts_anew():
    rule = METHODS["frlora"].default
    assert rule.steps(1) == ()
    assert rule.uploads(1) == ("A", "B")
    clients, start = [pair(i) for i in range(3)], pair(9)
    for round_ in (1, 2):
        step = server_round(rule, round_, clients, start)
        assert torch.equal(step.adapter.A, start.A)
        assert torch.equal(step.adapter.B, start.B)
        shares = np.array([1, 2, 5]) / 8
        a, b = (
            sum(p * getattr(c, x).double().numpy() for p, c in zip(shares, clients, strict=True))
            for x in "AB"
        )
        change = step.remainder.dense().numpy()
        np.testing.assert_allclose(change, b @ a - dense(start), atol=1e-12)
        assert step.remainder.value.rank == 2 * R


def test_frlora_starts_from_the_leading_directions_of_the_weights():
    model, original = AdaptedModel(adapted("pissa")), base_of("pissa").state_dict()
    for name, module in model.modules.items():
        found = module.scaling * model.start[name].to(torch.float64).product()
        u, s, vh = torch.linalg.svd(module.matrix(original[f"{name}.weight"]).double())
        r = model.start[name].rank
        torch.testing.assert_close(found, u[:, :r] * s[:r] @ vh[:r], atol=1e-5, rtol=1e-4)


def test_who_trains_alone_sends_nothing_and_continues_from_itself():
    rule = METHODS["local_only"].default
    assert rule.uploads(1) == ()
    assert rule.steps(1) == ()
    received = Trainables({"m": pair(1)}, {"head": draw(2, 3, seed=5)})
    trained = Trainables({"m": pair(2)}, {"head": draw(2, 3, seed=6)})
    assert rule.client.enter(entered(rule, received, {}, 1)) is received
    _, memory = rule.client.leave(entered(rule, received, {}), trained)
    start = rule.client.enter(entered(rule, received, memory))
    assert torch.equal(start.factors["m"].A, trained.factors["m"].A)
    assert torch.equal(start.factors["m"].B, trained.factors["m"].B)
    assert torch.equal(start.heads["head"], trained.heads["head"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedadam_factored", {"tau": 0.0}),
        ("fedadam_factored", {"beta1": 1.0}),
        ("fedadam_factored", {"rate": float("inf")}),
        ("lorafair_ridge", {"ridge": 0.0}),
        ("frlora", {"rank": 1}),
    ],
)
def test_an_option_out_of_its_range_is_refused(name, options):
    with pytest.raises(ValidationError):
        METHODS[name].rule_of(options)


@pytest.mark.parametrize(("local_rank", "count"), [(None, 5), (1, 3), (2, 6), (9, 9)])
def test_lora_a2_trains_the_ranks_that_matter_most_over_all_modules(local_rank, count):
    rule = METHODS["lora_a2"].rule_of({"local_rank": local_rank} if local_rank else {})
    assert [rule.trains(t) for t in (1, 2, 3)] == [("B",), ("A",), ("B",)]
    received = Trainables({name: pair(i) for i, name in enumerate("mno")}, {})
    for letter in "BA":
        probed = {
            name: Factors(x.A + (letter == "A") * pair(7).A, x.B + (letter == "B") * pair(8).B)
            for name, x in received.factors.items()
        }
        slots = rule.client.slots(entered(rule, received, {}), Trainables(probed, {}))
        found = {}
        for name, x in probed.items():
            before, after = received.factors[name], x
            for i in range(R):
                # |dB_i A_i|, the norm of a product of rank 1, multiplied out.
                d_b, d_a = (after.B - before.B)[:, i], (after.A - before.A)[i]
                one = np.outer(d_b.numpy(), before.A[i].numpy())
                other = np.outer(before.B[:, i].numpy(), d_a.numpy())
                found[name, i] = np.linalg.norm(one) + np.linalg.norm(other)
        best = sorted(found, key=lambda slot: -found[slot])[:count]
        assert {(name, i) for name in slots for i in range(R) if slots[name][i]} == set(best)
