"""Properties that every row of the table of methods, and every next adapter, must have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fedexlora.algebra import assignment
from fedexlora.algebra.assignment import Holder
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.algebra.moments import Moments
from fedexlora.exchange.layout import MEMORY_PARTS
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate
from fedexlora.methods import METHODS, Rule
from fedexlora.methods.fedex import NEXT_ADAPTERS
from fedexlora.methods.rule import ModuleRound, ModuleStep, Truncation
from fedexlora.rounds.common_update import CommonForm, HeldUpdate
from fedexlora.rounds.recipe_faults import method_faults
from fedexlora.rounds.reduction import Reducer, WeightedUpdate, step_in_memory
from fedexlora.rounds.step_certificate import certify_step

D_OUT, D_IN, RANK = 19, 31, 3
WEIGHTS = (1.0, 2.0, 5.0)
CHOICES = {name: method.default for name, method in METHODS.items()} | {
    f"fedex-{name}": METHODS["fedex"].rule_of({"next_adapter": name})
    for name in NEXT_ADAPTERS
    if name != "mean"
}

every_rule = pytest.mark.parametrize("rule", CHOICES.values(), ids=CHOICES.keys())


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def holder(rank: int = RANK) -> Holder:
    previous = Factors(draw(rank, D_IN, seed=70), draw(D_OUT, rank, seed=71))
    return Holder(
        rank, previous, lambda: Factors(draw(rank, D_IN, seed=72), torch.zeros(D_OUT, rank))
    )


def clients(rule: Rule, count: int = 3) -> list[Factors]:
    """Clients as the server sees them in round 1: a factor that they do not send is common."""
    common, sent = holder().previous, rule.uploads(1)
    return [
        Factors(
            draw(RANK, D_IN, seed=10 + i) if "A" in sent else common.A,
            draw(D_OUT, RANK, seed=20 + i) if "B" in sent else common.B,
        )
        for i in range(count)
    ]


def moments(factors: list[Factors], weights: tuple[float, ...] = WEIGHTS) -> Moments:
    return Moments.over(zip(factors, weights, strict=False))


def aggregate(
    rule: Rule, factors: list[Factors], weights: tuple[float, ...] = WEIGHTS, rank: int = RANK
) -> ModuleStep:
    """What the server makes of a module in round 1."""
    used = weights[: len(factors)]
    return rule.server(
        ModuleRound(
            name="m",
            round=1,
            scaling=1.5,
            clients=lambda: zip(factors, used, strict=True),
            holder=holder(rank),
            owners={},
            offset=LowRank.zeros(D_OUT, D_IN, torch.float64),
            norms={"m": tuple(float(f.product().norm()) for f in factors)},
        )
    )


def applied(step: ModuleStep) -> torch.Tensor:
    return step.adapter.to(torch.float32).to(torch.float64).product() + step.remainder.dense()


def ideal(factors: list[Factors]) -> torch.Tensor:
    used = WEIGHTS[: len(factors)]
    return sum(
        (w / sum(used)) * (f.B.double() @ f.A.double()) for f, w in zip(factors, used, strict=True)
    )


def stated(step: ModuleStep, factors: list[Factors]) -> torch.Tensor:
    """What the step is held to: the ideal, what is added to it, and what is left out of it."""
    target = ideal(factors)
    if step.added is not None:
        target = target + step.added.dense()
    if step.truncation is not None:
        target = target - step.truncation.whole.dense() + step.truncation.kept.dense()
    return target


@every_rule
def test_adapter_plus_remainder_is_what_the_rule_states(rule):
    factors = clients(rule)
    step, truth = aggregate(rule, factors), ideal(factors)
    if rule.certified:
        error = (applied(step) - stated(step, factors)).norm()
        assert error <= 1e-6 * truth.norm()
    off = float((applied(step) - truth).norm() / truth.norm())
    if rule.exact:
        assert off <= 1e-6
        assert step.added is None
        assert step.truncation is None
    elif step.truncation is not None:
        assert off * float(truth.norm()) == pytest.approx(
            step.truncation.lacks, rel=1e-4, abs=1e-6 * float(truth.norm())
        )
    elif not rule.personal and not rule.remembers:
        assert off > 1e-2, "a method that is exact should say so"


@pytest.mark.parametrize("name", NEXT_ADAPTERS)
@pytest.mark.parametrize("rank", [1, 2, 5, 12])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_every_next_adapter_is_exact_at_every_rank_of_its_holder(name, rank, count):
    rule = METHODS["fedex"].rule_of({"next_adapter": name})
    factors = clients(rule, count)
    weights = tuple(float(i + 1) for i in range(count))
    result = aggregate(rule, factors, weights, rank)
    truth = sum(w * (f.B.double() @ f.A.double()) for f, w in zip(factors, weights, strict=True))
    truth = truth / sum(weights)
    assert result.adapter.rank == rank
    assert float((applied(result) - truth).norm() / truth.norm()) <= 1e-6
    # A row of A and a column of B that are both zero would never be trained.
    found = result.adapter
    assert ((found.A.norm(dim=1) > 0) | (found.B.norm(dim=0) > 0)).all()


@every_rule
def test_one_client_gets_its_own_update_back_but_for_what_is_cut_off(rule):
    (client,) = clients(rule, 1)
    step = aggregate(rule, [client])
    difference = applied(step) - stated(step, [client])
    assert difference.norm() <= 1e-6 * (client.B @ client.A).norm()


@every_rule
def test_factors_that_nobody_sent_and_the_rule_leaves_alone_come_back_bit_for_bit(rule):
    factors = clients(rule)
    found = aggregate(rule, factors).adapter.to(torch.float32)
    common = holder().previous
    if "A" not in rule.steps(1):
        assert torch.equal(found.A, common.A)
    if "B" not in rule.steps(1):
        assert torch.equal(found.B, common.B)


@every_rule
def test_shapes_dtypes_and_inputs(rule):
    factors = clients(rule)
    copies = [(f.A.clone(), f.B.clone()) for f in factors]
    step = aggregate(rule, factors)
    assert step.adapter.shape == step.remainder.shape == (D_OUT, D_IN)
    assert set(step.memory) <= set(MEMORY_PARTS)
    assert bool(step.memory) == rule.remembers
    for pair, (a, b) in zip(factors, copies, strict=True):
        assert torch.equal(pair.A, a)
        assert torch.equal(pair.B, b)


@every_rule
def test_the_order_of_clients_moves_only_last_bits(rule):
    factors = clients(rule)
    one, other = (applied(aggregate(rule, factors[::turn], WEIGHTS[::turn])) for turn in (1, -1))
    assert (one - other).norm() <= 1e-6 * one.norm()


@every_rule
def test_weights_count_by_their_ratios_and_move_the_result(rule):
    factors = clients(rule)
    one = applied(aggregate(rule, factors))
    doubled = applied(aggregate(rule, factors, tuple(2 * w for w in WEIGHTS)))
    assert (one - doubled).norm() <= 1e-6 * one.norm()
    other = applied(aggregate(rule, factors, (5.0, 2.0, 1.0)))
    if rule.weighs_clients:
        assert (one - other).norm() <= 1e-6 * one.norm()
        return
    change = one - holder().previous.to(torch.float64).product()
    assert bool((one - other).norm() > 1e-2 * change.norm()) == bool(rule.uploads(1))


def test_the_best_adapter_is_the_dense_optimum_and_balanced():
    factors = clients(CHOICES["fedex"])
    found = assignment.best(moments(factors), holder())
    u, s, vh = torch.linalg.svd(ideal(factors))
    optimum = u[:, :RANK] * s[:RANK] @ vh[:RANK]
    torch.testing.assert_close(found.product(), optimum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.A @ found.A.T, found.B.T @ found.B, rtol=1e-8, atol=1e-8)


def test_alignment_changes_the_factors_and_not_their_product_and_is_the_nearest_turn():
    sums, whom = moments(clients(CHOICES["fedex"])), holder()
    plain, turned = assignment.best(sums, whom), assignment.best_aligned(sums, whom)
    torch.testing.assert_close(turned.product(), plain.product(), rtol=1e-9, atol=1e-9)

    def distance(x: Factors) -> float:
        return float((x.A - whom.previous.A).norm() ** 2 + (x.B - whom.previous.B).norm() ** 2)

    assert distance(turned) < distance(plain)
    for seed in range(20):
        turn, _ = torch.linalg.qr(draw(RANK, RANK, seed=seed).double())
        assert distance(turned) <= distance(Factors(turn.T @ plain.A, plain.B @ turn)) + 1e-9


def test_the_remainder_of_the_best_adapter_has_the_rank_that_is_left():
    sums = moments(clients(CHOICES["fedex"]))
    remainder = assignment.remainder(sums, assignment.best(sums, holder()))
    assert remainder.value.rank == 3 * RANK - RANK


@pytest.mark.parametrize("rank", [1, 4])
def test_a_truncated_remainder_is_off_by_what_it_states(rank):
    rule = METHODS["fedex"].rule_of({"remainder_rank": rank})
    assert not rule.exact
    assert rule.certified
    factors = clients(rule)
    step = aggregate(rule, factors)
    assert step.remainder.value.rank == rank
    off = float((applied(step) - ideal(factors)).norm())
    assert off == pytest.approx(step.truncation.lacks, rel=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("dense", [False, True])
def test_energy_keeps_at_least_its_share(energy, dense):
    sums = moments(clients(CHOICES["fedex"]))
    whole = assignment.remainder(sums, sums.mean)
    if dense:
        whole = LowRank(whole.dense(torch.float32))
    kept, lacks = assignment.truncate_to_energy(energy)(whole)
    assert kept.squared_norm() >= (energy - 1e-6) * whole.squared_norm()
    # Norms of the two sides are float32 and float64 sums.
    difference = float((whole.dense() - kept.dense()).norm())
    assert difference == pytest.approx(lacks, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("small", [0, 1024])
def test_the_energy_of_a_dense_remainder_is_held_by_the_fewest_directions(monkeypatch, small):
    monkeypatch.setattr(assignment, "_SMALL", small)
    b, a = (torch.linalg.qr(draw(size, 60, seed=size)).Q for size in (70, 90))
    values = 0.7 ** torch.arange(60)
    whole = LowRank((b * values) @ a.T)
    energies = values.square().cumsum(0) / values.square().sum()
    for energy in (0.6, 0.9, 0.999):
        kept, lacks = assignment.truncate_to_energy(energy)(whole)
        assert kept.value.rank == int((energies < energy).sum()) + 1
        assert lacks == pytest.approx(float((whole.dense() - kept.dense()).norm()), rel=1e-5)


@pytest.mark.parametrize(("stated", "held"), [(0.0, False), (0.5, False), (1.0, True)])
def test_a_truncation_that_lacks_more_than_it_states_is_not_held(stated, held):
    """A rule that applies nothing, and states a share of what that leaves out."""

    def server(module: ModuleRound) -> ModuleStep:
        adapter = module.holder.previous.to(torch.float64).scaled(0.0)
        whole = assignment.remainder(module.moments, adapter)
        none = LowRank.zeros(D_OUT, D_IN, torch.float64)
        lacks = stated * whole.squared_norm() ** 0.5
        return ModuleStep(adapter, none, truncation=Truncation(whole, none, lacks))

    rule = Rule(server, exact=False, certified=True)
    spec = AdapterSpec({"q": ModuleSpec(D_OUT, D_IN, RANK, torch.float32, 2.0)}, {}, ("A", "B"))
    start = Factors(draw(RANK, D_IN, seed=1), torch.zeros(D_OUT, RANK))
    total = {"q": LowRank.zeros(D_OUT, D_IN, torch.float64)}
    before = GlobalState(0, "0" * 64, {"q": start}, total, {})
    form = CommonForm(before, spec, {})
    updates = [
        ClientUpdate(str(i), 1, before.id, 1, 0.0, "", {"A/q": pair.A, "B/q": pair.B})
        for i, pair in enumerate(clients(CHOICES["fedex"]))
    ]
    counted = [WeightedUpdate(HeldUpdate.of(update, form), 1.0) for update in updates]
    made = Reducer(form, rule, lambda _: {}).reduce(counted, step_in_memory(before, rule))
    found = certify_step(spec, before.advance([made.step]), made)
    assert found.overall.held == held


@pytest.mark.parametrize("name", METHODS)
def test_every_row_says_what_people_ask(name):
    method = METHODS[name]
    assert method.name == name
    assert method.paper
    assert method.title
    assert method.sends
    assert method.keeps
    assert method.certified_against
    assert set(method.default.factors) <= {"A", "B"}
    for field in method.options.model_fields.values():
        assert field.description, "an option says what it does"
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    head, _, section = page.read_text(encoding="utf-8").partition(f"# `{name}`")
    assert head.endswith(("\n#", "\n##"))
    said = section.partition("\n## ")[0]
    for number in re.findall(r"arXiv:[0-9.]+|openreview:\w+", method.paper):
        assert number in said
    assert all(f"`{option}`" in said for option in method.options.model_fields)


def test_options_that_a_method_does_not_have_are_all_named_with_the_nearest():
    given = {"name": "fedex", "next_adaptor": "svd", "remainder_rank": 0, "momentum": 0.5}
    faults = method_faults(given)
    known = "next_adapter, remainder_rank, remainder_energy"
    assert faults == [
        "method.remainder_rank: input should be greater than or equal to 1",
        "method.next_adaptor: fedex has no such option; did you mean 'next_adapter'?",
        f"method.momentum: fedex has no such option; known: {known}",
    ]
    assert method_faults({"name": "fedit", "rank": 3}) == [
        "method.rank: fedit has no such option; it has none"
    ]
    assert "not both" in method_faults({"remainder_rank": 1, "remainder_energy": 0.5})[0]
