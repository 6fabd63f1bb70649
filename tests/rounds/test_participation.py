"""Who takes part, how much each one counts, and that whoever comes back holds the same model."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fedexlora.errors import NoUpdatesError, RecipeError
from fedexlora.methods import METHODS
from fedexlora.methods.rule import ClientRule
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.participation import Participation
from fedexlora.rounds.transport import Reply
from tests.models import adapted, live_update, lora_layers
from tests.rounds.scripted import OTHER, Scripted, federation, random_update, replies, run_round

CLIENTS = tuple(f"client-{i:02d}" for i in range(50))


def test_everybody_takes_part_unless_it_is_said_otherwise():
    assert Participation().sample(CLIENTS, 0, 1) == CLIENTS


@pytest.mark.parametrize("rules", [{"clients_per_round": 5}, {"fraction": 0.09}])
def test_samples_depend_on_seed_and_round_alone(rules):
    rule = Participation(**rules)
    samples = [rule.sample(CLIENTS, 3, round_) for round_ in range(1, 401)]
    assert samples == [rule.sample(CLIENTS, 3, round_) for round_ in range(1, 401)]
    assert samples[0] != rule.sample(CLIENTS, 4, 1)
    assert all(len(set(s)) == 5 and list(s) == sorted(s) for s in samples)
    counts = Counter(client for sample in samples for client in sample)
    assert len(counts) == 50
    assert 15 < min(counts.values()) < max(counts.values()) < 75  # 40 each on average


def test_a_fraction_is_rounded_up_but_not_by_rounding():
    hundred = [str(i) for i in range(100)]
    assert len(Participation(fraction=0.07).sample(hundred, 0, 1)) == 7
    assert len(Participation(fraction=0.071).sample(hundred, 0, 1)) == 8
    assert len(Participation(fraction=1.0).sample(hundred, 0, 1)) == 100


def test_weights():
    assert Participation().weight(7) == 7.0
    assert Participation(weighting="uniform").weight(7) == 1.0
    capped = Participation(weighting="capped", weight_cap=5)
    assert [capped.weight(n) for n in (3, 5, 900)] == [3.0, 5.0, 5.0]
    assert [capped.weight(900, staleness=n) for n in (0, 3)] == [5.0, 2.5]


@pytest.mark.parametrize(
    ("changes", "shares"),
    [({"weighting": "uniform"}, [1, 1, 1]), ({"weighting": "capped", "weight_cap": 2}, [1, 2, 2])],
)
def test_the_weights_are_those_of_the_aggregate(changes, shares):
    model = AdaptedModel(adapted("roberta"))
    parts, state = federation(model, "fedex", participation=Participation(**changes))
    _, record = run_round(parts, state)
    total = sum(shares)
    assert [c.weight for c in record.clients] == [share / total for share in shares]
    sent = [random_update(model, 1, c).tensors for c in parts.transport.clients]
    for name, layer in lora_layers(model.peft_model):
        ideal = layer.scaling["default"] * sum(
            share / total * u[f"B/{name}"].double() @ u[f"A/{name}"].double()
            for share, u in zip(shares, sent, strict=True)
        )
        assert float((live_update(model, name) - ideal).norm()) <= 2e-6 * float(ideal.norm())


def late_script(model, late: dict[int, str]):
    """In each round of ``late``, that client's update comes in the next round, not in its own."""
    stash = []

    def script(round_, client, held):
        found = replies(random_update(model, round_, client))
        if late.get(round_) == client:
            stash.extend(found)
            found = [Reply(client, round_, failure="late: 9.0 s, the round's deadline is 5 s")]
        elif stash and stash[0].round < round_:
            return [stash.pop(), *found]
        return found

    return script


def test_late_updates_are_refused_by_their_round():
    model = AdaptedModel(adapted("roberta"))
    parts, state = federation(model, "fedex", late_script(model, {1: "site-b"}))
    state, first = run_round(parts, state)
    assert [c.client for c in first.clients] == ["site-a", "site-c"]
    assert first.left_out[0].reasons == ("late: 9.0 s, the round's deadline is 5 s",)
    parts.transport.waiting = {"site-b": 1}
    _, record = run_round(parts, state)
    assert [c.client for c in record.clients] == ["site-a", "site-c"]
    assert [c.reasons for c in record.left_out] == [
        ("it still works for round 1",),
        ("late: an update of round 1 in round 2",),
    ]


@pytest.mark.parametrize("next_adapter", ["mean", "svd", "reinit"])
@pytest.mark.parametrize("variant", ["llama-rslora", "roberta-biases"])
def test_an_accepted_late_update_puts_its_change_on_the_model_of_now(variant, next_adapter):
    model = AdaptedModel(adapted(variant))
    rule = Participation(stale="accept")
    script = late_script(model, {2: "site-b"})
    method = METHODS["fedex"].rule_of({"next_adapter": next_adapter})
    parts, state = federation(model, method, script, participation=rule)
    state, _ = run_round(parts, state)
    started = state  # what the late update was trained from
    state, _ = run_round(parts, state)
    before = {name: live_update(model, name) for name in model.modules}
    parts.transport.waiting = {"site-b": 2}
    after, record = run_round(parts, state)
    assert record.certificate.held
    assert [(c.client, c.staleness) for c in record.clients] == [
        ("site-a", 0),
        ("site-b", 1),
        ("site-c", 0),
    ]
    weights = {"site-a": 1.0, "site-b": 2 / 2**0.5, "site-c": 5.0}
    total = sum(weights.values())
    shares = {c.client: c.weight for c in record.clients}
    assert shares == pytest.approx({c: w / total for c, w in weights.items()})
    from_ = {"site-a": state, "site-b": started, "site-c": state}
    sent = {c: random_update(model, 2 if c == "site-b" else 3, c).tensors for c in weights}
    for name, layer in lora_layers(model.peft_model):
        change = sum(
            weights[c]
            / total
            * (
                sent[c][f"B/{name}"].double() @ sent[c][f"A/{name}"].double()
                - from_[c].adapter[name].to(torch.float64).product()
            )
            for c in weights
        )
        ideal = before[name] + layer.scaling["default"] * change
        assert float((live_update(model, name) - ideal).norm()) <= 2e-6 * float(ideal.norm())
    for name, tensor in after.dense.items():
        ideal = state.dense[name].double() + sum(
            weights[c] / total * (sent[c][f"dense/{name}"].double() - from_[c].dense[name].double())
            for c in weights
        )
        assert float((tensor - ideal).norm()) <= 1e-6 * float(ideal.norm())


def test_a_late_update_that_was_not_waited_for_or_is_too_old_does_not_count():
    model = AdaptedModel(adapted("roberta"))
    old = random_update(model, 1, "site-b")

    def script(round_, client, held):
        found = replies(random_update(model, round_, client))
        return [*replies(old), *found] if round_ > 1 and client == "site-a" else found

    rule = Participation(stale="accept")
    parts, state = federation(model, "fedex", script, participation=rule)
    state, _ = run_round(parts, state)
    state, record = run_round(parts, state)
    assert len(record.clients) == 3
    assert record.left_out[0].reasons == (
        "late: an update of round 1 in round 2, which was not waited for",
    )
    for _ in range(4):
        parts.transport.waiting = {"site-b": 1}
        state, record = run_round(parts, state)
    assert record.round == 6
    reasons = [reason for c in record.left_out for reason in c.reasons]
    assert "late: an update of round 1 in round 6; at most 4 rounds (federation.history)" in reasons


def test_too_few_updates_stop_the_round():
    model = AdaptedModel(adapted("roberta"))

    def script(round_, client, held):
        if client == "site-b":
            return [Reply(client, round_, failure="went away")]
        return replies(random_update(model, round_, client))

    parts, state = federation(model, "fedex", script, participation=Participation(min_updates=3))
    with pytest.raises(NoUpdatesError, match="2 usable updates, federation.min_updates is 3"):
        run_round(parts, state)


def test_who_was_not_asked_does_not_count():
    model = AdaptedModel(adapted("roberta"))

    def script(round_, client, held):
        others = [random_update(model, round_, c) for c in ("site-a", "site-b", "site-c")]
        return replies(*others)

    rule = Participation(clients_per_round=1)
    parts, state = federation(model, "fedex", script, participation=rule)
    _, record = run_round(parts, state)
    assert len(record.clients) == 1
    reasons = [c.reasons[0] for c in record.left_out]
    assert reasons == ["it was not asked to take part in this round"] * 2


WAYS = ("raises", "silent", "twice", "nan", "truncated", "old version", "wiped", "another history")


@pytest.mark.exactness
def test_thirty_rounds_of_fifty_clients_that_come_go_and_fail():
    """The global model is the float64 ideal of the good updates, and everybody trains on it."""
    model = AdaptedModel(adapted("llama-rslora"))
    layers = dict(lora_layers(model.peft_model))
    scaling = {name: layer.scaling["default"] for name, layer in layers.items()}
    untouched = {n: layer.get_base_layer().weight.double().clone() for n, layer in layers.items()}
    frozen, oracle = dict(untouched), dict(untouched)
    counts = {client: 1 + i % 9 for i, client in enumerate(CLIENTS)}
    fate = random.Random(8)
    events: Counter[str] = Counter()
    good: list = []
    now = {}

    def script(round_, client, held):
        assert held.id == now["id"], "it trains on another model"
        way = fate.choice(WAYS) if fate.random() < 0.2 else "good"
        events[way] += 1
        generator = torch.Generator().manual_seed(1000 * round_ + int(client[-2:]))
        tensors = {
            name: start + 0.02 * torch.randn(start.shape, generator=generator)
            for module, pair in held.adapter.items()
            for name, start in ((f"A/{module}", pair.A), (f"B/{module}", pair.B))
        }
        changes = {"num_examples": counts[client], "tensors": tensors}
        update = random_update(model, round_, client, **changes)
        if way == "wiped":
            transport.held.pop(client)
        if way == "another history":
            transport.held[client] = replace(held, id=OTHER)
        if way == "raises":
            return [Reply(client, round_, failure="OutOfMemoryError")]
        if way == "silent":
            return []
        if way == "nan":
            first = next(iter(tensors))
            update.tensors[first][0, 0] = float("nan")
            return replies(update)
        if way == "truncated":
            return [Reply(client, round_, update.encode()[:-7])]
        if way == "old version":
            return replies(random_update(model, round_, client, **changes, version=OTHER))
        good.append((counts[client], tensors))
        return replies(update, update) if way == "twice" else replies(update)

    rule = Participation(clients_per_round=5)
    transport = Scripted(script, CLIENTS)
    parts, state = federation(model, "fedex", transport=transport, participation=rule)
    downloads = {}
    for round_ in range(1, 31):
        good.clear()
        now["id"] = state.id
        state, record = run_round(parts, state)
        assert record.certificate.held
        assert record.bytes.down == sum(size for _, size in transport.delivered)
        downloads[round_] = {c.client: c for c in (*record.clients, *record.left_out)}
        transport.delivered.clear()
        total = sum(weight for weight, _ in good)
        for name in oracle:
            oracle[name] = frozen[name] + scaling[name] * sum(
                weight / total * (t[f"B/{name}"].double() @ t[f"A/{name}"].double())
                for weight, t in good
            )
            # What the next adapter adds again is not in the frozen weight.
            pair = state.adapter[name].to(torch.float64)
            frozen[name] = oracle[name] - scaling[name] * pair.product()
    for name in layers:
        ideal = oracle[name] - untouched[name]
        assert float((live_update(model, name) - ideal).norm()) <= 1e-6 * float(ideal.norm()) + 1e-6
    assert events["good"] > 100
    assert sum(events[way] > 0 for way in WAYS) == len(WAYS)
    sizes = [d.downloaded_bytes for d in downloads[26].values() if d.since is None]
    dense = sum(8 * m.d_in * m.d_out for m in model.spec.modules.values())
    factors = sum(4 * m.rank * (m.d_in + m.d_out) for m in model.spec.modules.values())
    header = 400 * 4 * len(model.modules)
    assert all(size <= dense + factors + header for size in sizes)


def test_late_updates_need_a_method_that_has_a_place_for_them(document):
    from fedexlora.rounds.recipe import parse_recipe

    changes = {"method": {"name": "fedit"}, "federation": {"stale": "accept"}}
    with pytest.raises(
        RecipeError, match=r"federation\.stale: fedit has no place for late updates"
    ):
        parse_recipe(document | changes, "test")


@pytest.mark.parametrize(
    ("federation_table", "message"),
    [
        ({"clients_per_round": 2, "fraction": 0.5}, "federation.fraction: give it or"),
        (
            {"clients_per_round": 2, "min_updates": 3},
            "min_updates: 3 cannot come from 2",
        ),
        ({"weighting": "capped"}, "federation.weight_cap: needed by weighting"),
        ({"weight_cap": 3}, "federation.weight_cap: needed by weighting"),
        ({"fraction": 1.5}, "federation.fraction"),
        ({"stale": "accept", "history": 0}, "federation.history: 0 keeps no version"),
    ],
)
def test_rules_that_cannot_be_are_refused(document, federation_table, message):
    from fedexlora.rounds.recipe import parse_recipe

    with pytest.raises(RecipeError) as caught:
        parse_recipe(document | {"federation": federation_table}, "test")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("memory", "rule", "reason"),
    [
        ((0, 0), "required", "its memory of the rounds before is gone"),
        ((0, 0), "optional", None),
        ((0, 1), "required", None),
        ((0, 2), "optional", "memory: expected that of a round before 2, found 2"),
        ((0, -1), "optional", "memory: expected that of a round before 2, found -1"),
    ],
)
def test_a_memory_that_is_gone_or_of_another_round(memory, rule, reason):
    """What client site-b says of it in rounds 1 and 2, where the method can do without, or not."""
    model = AdaptedModel(adapted("roberta-biases"))

    def script(round_, client, held):
        of_round = memory[round_ - 1] if client == "site-b" else round_ - 1
        return replies(random_update(model, round_, client, memory=of_round))

    made = replace(METHODS["fedex"].default, client=ClientRule(memory=rule))
    parts, state = federation(model, made, script)
    state, first = run_round(parts, state)
    assert not first.left_out, "nobody has a memory before the first round"
    _, record = run_round(parts, state)
    assert [(x.client, x.reasons) for x in record.left_out] == (
        [("site-b", (reason,))] if reason else []
    )
    found = {client.client: client.memory for client in record.clients}
    assert found.get("site-b") == (None if reason else memory[1])
    assert record.certificate.held
