"""Bad updates are named, and the global model is the stated mean of the changes that count."""

from __future__ import annotations

import json

import pytest
import torch

from fedexlora.errors import ExactnessError, NoUpdatesError, RecipeError
from fedexlora.exchange.digest import tensors_digest
from fedexlora.exchange.state import state_tensors
from fedexlora.methods import METHODS
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.participation import Participation
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from fedexlora.rounds.screening import Screening
from fedexlora.rounds.transport import Reply
from tests.models import adapted, live_update
from tests.rounds.scripted import Scripted, federation, random_update, replies, run_round

CLIENTS = tuple(f"site-{i}" for i in range(8))
ROWS = {client: 1 + i % 3 for i, client in enumerate(CLIENTS)}
BAD = {"site-0": 100.0, "site-4": -30.0}
"""What the changes of bad clients are multiplied by."""
RULES = {
    "clip": Screening("clip"),
    "multi_krum": Screening("multi_krum", bad_share=0.25),
    "trimmed_mean": Screening("trimmed_mean", bad_share=0.25),
    "geometric_median": Screening("geometric_median"),
}


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(model, held, round_, client, factor=1.0, **changes):
    """An update that moves as all do in the round, and a little otherwise, times ``factor``."""
    own = 1 + 100 * round_ + CLIENTS.index(client)
    tensors = {}
    for name, pair in held.adapter_of(client).items():
        rank = pair.rank
        step = 0.05 * drawn(round_, pair.B.shape[0], 9)[:, :rank]
        step = step + 0.01 * drawn(own, pair.B.shape[0], rank)
        a = pair.A if factor != 1.0 else pair.A + 0.01 * drawn(own, rank, pair.A.shape[1])
        if "A" in model.spec.trained:
            tensors[f"A/{name}"] = a
        tensors[f"B/{name}"] = pair.B + factor * step
    for name, tensor in held.dense.items():
        step = 0.05 * drawn(round_, *tensor.shape) + 0.01 * drawn(own, *tensor.shape)
        tensors[f"dense/{name}"] = tensor + factor * step
    fields = {"tensors": tensors, "num_examples": ROWS[client]} | changes
    return random_update(model, round_, client, **fields)


def attacked(model, sent, bad=BAD, change=lambda update: update):
    """Clients of which some send a multiple of their change; ``sent`` gets what they send."""

    def script(round_, client, held):
        update = change(trained(model, held, round_, client, bad.get(client, 1.0)))
        sent[round_, client] = update
        return replies(update)

    return script


def screened(model, screening, script, **changes):
    parts = {"transport": Scripted(script, CLIENTS), "screening": screening} | changes
    return federation(model, parts.pop("method", "fedex"), **parts)


def vectors(model, updates, starts, specs):
    """Changes of the global model as dense vectors, ``(k, n)`` float64, and by module and head."""
    parts = []
    for update, start in zip(updates, starts, strict=True):
        spec = specs.get(update.client, model.spec)
        part = {}
        for name, pair in start.adapter_of(update.client).items():
            new = update.tensors[f"B/{name}"].double() @ update.tensors[f"A/{name}"].double()
            old = pair.B.double() @ pair.A.double()
            part[name] = spec.modules[name].scaling * (new - old)
        for name, tensor in start.dense.items():
            part[f"dense/{name}"] = update.tensors[f"dense/{name}"].double() - tensor.double()
        parts.append(part)
    return torch.stack([torch.cat([x.flatten() for x in p.values()]) for p in parts]), parts


def naive(rule, dense, rows, bad):
    """Shares of the changes by the rule, which is written down once more, on dense vectors."""
    rows = torch.tensor(rows, dtype=torch.float64)
    if rule == "clip":
        lengths = dense.norm(dim=1)
        return rows / rows.sum() * (lengths.median() / lengths).clamp(max=1.0)
    if rule == "geometric_median":
        shares = rows / rows.sum()
        for _ in range(3000):
            shares = rows / (dense - shares @ dense).norm(dim=1)
            shares = shares / shares.sum()
        return shares
    return (rows * ~bad) / (rows * ~bad).sum()


def check(model, before, record, after, state, updates, starts, specs, rule):
    """The model moved by the stated mean of the changes, and nothing else."""
    assert record.certificate.held
    dense, parts = vectors(model, updates, starts, specs)
    bad = torch.tensor([update.client in BAD for update in updates])
    weights = [u.num_examples / (1 + record.round - u.round) ** 0.5 for u in updates]
    shares = naive(rule, dense, weights, bad).tolist()
    found = {c.client: c.weight for c in record.clients}
    for update, share in zip(updates, shares, strict=True):
        assert found.get(update.client, 0.0) == pytest.approx(share, rel=1e-6, abs=1e-12)
    assert sum(found.values()) + record.stay == pytest.approx(1.0)
    norms = {u.client: float(x.norm()) for u, x in zip(updates, dense, strict=True)}
    assert {c.client: c.norm for c in record.clients} == pytest.approx({c: norms[c] for c in found})
    for name in model.modules:
        ideal = before[name] + sum(s * p[name] for s, p in zip(shares, parts, strict=True))
        assert float((live_update(model, name) - ideal).norm()) <= 1e-6 * float(ideal.norm())
    for name, tensor in after.dense.items():
        moved = sum(s * p[f"dense/{name}"] for s, p in zip(shares, parts, strict=True))
        ideal = state.dense[name].double() + moved
        assert float((tensor - ideal).norm()) <= 1e-6 * float(ideal.norm())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("variant", "ranks"),
    [
        ("llama-rslora", {}),
        ("roberta", {}),
        ("roberta", {"site-2": (5, 1.5), "site-4": (1, 4.0)}),
        ("gpt2-patterns", {"site-6": (2, 0.5)}),
    ],
)
def test_the_global_model_is_the_stated_mean_of_the_changes_that_count(variant, ranks, rule):
    model, sent = AdaptedModel(adapted(variant)), {}
    specs = {
        client: model.spec.reshaped(dict.fromkeys(model.spec.modules, shape))
        for client, shape in ranks.items()
    }
    parts, state = screened(model, RULES[rule], attacked(model, sent), specs=specs)
    for round_ in (1, 2):
        before = {name: live_update(model, name) for name in model.modules}
        after, record = run_round(parts, state)
        updates = [sent[round_, client] for client in CLIENTS]
        check(model, before, record, after, state, updates, [state] * 8, specs, rule)
        state = after
        clipped = [c.client for c in record.clients if c.counted < 1.0]
        assert set(BAD) <= set(clipped) if rule == "clip" else not clipped
        rejects = rule in ("multi_krum", "trimmed_mean")
        assert [c.client for c in record.left_out] == (list(BAD) if rejects else [])
        assert all(c.reasons[0].startswith(f"{rule}: distance") for c in record.left_out)
        assert all(", the 6 kept have at most " in c.reasons[0] for c in record.left_out)
        counted = sum(c.weight for c in record.clients if c.client in BAD)
        assert counted <= (0.02 if rule == "clip" else 0.01)


@pytest.mark.parametrize("rule", RULES)
def test_a_late_update_is_judged_by_its_change_of_the_version_that_it_started_from(rule):
    model, sent, stash = AdaptedModel(adapted("roberta-biases")), {}, []
    good = attacked(model, sent)

    def script(round_, client, held):
        if (round_, client) == (2, "site-5"):
            stash.extend(good(round_, client, held))
            return [Reply(client, round_, failure="late: 9.0 s, the round's deadline is 5 s")]
        return [*([stash.pop()] if round_ == 3 and stash else []), *good(round_, client, held)]

    rules = Participation(stale="accept")
    parts, state = screened(model, RULES[rule], script, participation=rules)
    state, _ = run_round(parts, state)
    started = state
    state, _ = run_round(parts, state)
    parts.transport.waiting = {"site-5": 2}
    before = {name: live_update(model, name) for name in model.modules}
    after, record = run_round(parts, state)
    assert [c.client for c in record.clients if c.staleness] == ["site-5"]
    updates = [sent[2 if c == "site-5" else 3, c] for c in CLIENTS]
    starts = [started if c == "site-5" else state for c in CLIENTS]
    check(model, before, record, after, state, updates, starts, {}, rule)


@pytest.mark.parametrize("rule", RULES)
def test_another_gauge_of_the_same_product_is_judged_alike(rule):
    def turned(update):
        """``(4 B Q, Q^T A / 4)``: the same product."""
        if update.client not in ("site-2", "site-4"):
            return update
        tensors = dict(update.tensors)
        for name in model.spec.modules:
            a, b = tensors[f"A/{name}"], tensors[f"B/{name}"]
            q = torch.linalg.qr(drawn(5, len(a), len(a)))[0]
            tensors[f"A/{name}"], tensors[f"B/{name}"] = q.T @ a / 4, 4 * b @ q
        fields = {f: getattr(update, f) for f in ("client", "round", "num_examples")}
        return random_update(model, fields.pop("round"), fields.pop("client"), tensors=tensors)

    found = []
    for change in (lambda update: update, turned):
        model = AdaptedModel(adapted("llama-rslora"))
        script = attacked(model, {}, change=change)
        rule_ = Participation(weighting="uniform")
        parts, state = screened(model, RULES[rule], script, participation=rule_)
        _, record = run_round(parts, state)
        assert record.certificate.held
        found.append((record, {name: live_update(model, name) for name in model.modules}))
    (plain, ideal), (other, applied) = found
    for one, two in zip(plain.clients, other.clients, strict=True):
        assert one.client == two.client
        assert one.weight == pytest.approx(two.weight, rel=1e-4)
        assert one.norm == pytest.approx(two.norm, rel=1e-5)
    assert [c.client for c in plain.left_out] == [c.client for c in other.left_out]
    for name in ideal:
        assert float((applied[name] - ideal[name]).norm()) <= 1e-5 * float(ideal[name].norm())


@pytest.mark.parametrize(
    "screening",
    [
        Screening("clip", clip_norm=1e9),
        Screening("multi_krum", bad_share=0.0),
        Screening("trimmed_mean", bad_share=0.0),
    ],
)
@pytest.mark.parametrize("method", ["fedex", "fedit", "ffa"])
def test_the_bits_are_the_same_when_nothing_is_rejected(method, screening):
    prints = []
    for rule in (None, screening):
        model = AdaptedModel(adapted("roberta"), METHODS[method].default.factors)
        parts, state = screened(model, rule, attacked(model, {}), method=method)
        for _ in range(2):
            state, record = run_round(parts, state)
        prints.append(tensors_digest(state_tensors(state)))
        assert len(record.clients) == 8
        assert record.stay == 0.0
        assert all((c.norm is None) == (rule is None) for c in record.clients)
    assert prints[0] == prints[1]


def test_a_clipped_mean_of_factors_is_that_of_the_clients_and_the_version_held():
    model, sent = AdaptedModel(adapted("roberta")), {}
    parts, state = screened(model, RULES["clip"], attacked(model, sent), method="fedit")
    state, _ = run_round(parts, state)
    after, record = run_round(parts, state)
    for name, pair in state.adapter.items():
        for letter, held in (("A", pair.A), ("B", pair.B)):
            mean = record.stay * held.double() + sum(
                c.weight * sent[2, c.client].tensors[f"{letter}/{name}"].double()
                for c in record.clients
            )
            found = getattr(after.adapter[name], letter)
            assert float((found - mean).norm()) <= 1e-6 * float(mean.norm())


def test_ffa_stays_exact_when_changes_are_clipped():
    model = AdaptedModel(adapted("roberta"), METHODS["ffa"].default.factors)
    parts, state = screened(model, RULES["clip"], attacked(model, {}), method="ffa")
    for _ in range(2):
        state, record = run_round(parts, state)
        assert record.certificate.held
        assert record.stay > 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1e6, 1e12])
def test_an_update_of_any_size_leaves_the_model_exact(rule, size):
    """The bad client is the first one, where the running means would begin with it."""
    model = AdaptedModel(adapted("roberta"))
    parts, state = screened(model, RULES[rule], attacked(model, {}, {"site-0": size}))
    for _ in range(2):
        state, record = run_round(parts, state)
        assert record.certificate.held
    honest = AdaptedModel(adapted("roberta"))
    parts, other = screened(honest, None, attacked(honest, {}, {}))
    for _ in range(2):
        other, _ = run_round(parts, other)
    for name in model.modules:
        found, ideal = (live_update(m, name) for m in (model, honest))
        assert float((found - ideal).norm()) <= 0.5 * float(ideal.norm())


def test_rejected_clients_that_continue_from_their_own_factors_keep_what_they_held():
    model, sent, bad = AdaptedModel(adapted("roberta")), {}, {}
    method = METHODS["fedex"].rule_of({"next_adapter": "keep"})
    rules = attacked(model, sent, bad)
    screening = Screening("trimmed_mean", bad_share=0.1)
    parts, state = screened(model, screening, rules, method=method)
    bad["site-3"] = 50.0
    state, _ = run_round(parts, state)
    assert set(state.own) == set(CLIENTS) - {"site-3"}
    del bad["site-3"]
    bad["site-4"] = 50.0
    after, record = run_round(parts, state)
    assert [c.client for c in record.left_out] == ["site-4"]
    assert record.certificate.held
    assert after.own["site-4"] is state.own["site-4"]
    assert after.own["site-5"] is not state.own["site-5"]


def test_rules_on_too_few_updates_stop_the_round_and_say_why():
    model = AdaptedModel(adapted("roberta"))
    good = attacked(model, {})

    def script(round_, client, held):
        if client > "site-5":
            return [Reply(client, round_, failure="went away")]
        return good(round_, client, held)

    parts, state = screened(model, RULES["multi_krum"], script)
    with pytest.raises(NoUpdatesError, match=r"round 1: multi_krum needs 2 f \+ 3 = 7 .*found 6"):
        run_round(parts, state)
    rule = Participation(min_updates=5)
    parts, state = screened(model, RULES["trimmed_mean"], script, participation=rule)
    with pytest.raises(NoUpdatesError, match="round 1: 4 usable updates") as caught:
        run_round(parts, state)
    assert "site-7: went away" in caught.value.faults
    assert sum("trimmed_mean: distance from the geometric" in f for f in caught.value.faults) == 2


def test_a_second_update_of_a_client_does_not_count_under_a_rule():
    model = AdaptedModel(adapted("roberta"))
    good = attacked(model, {}, {})

    def script(round_, client, held):
        return good(round_, client, held) * (2 if client == "site-1" else 1)

    parts, state = screened(model, RULES["geometric_median"], script)
    _, record = run_round(parts, state)
    assert len(record.clients) == 8
    assert [c.reasons for c in record.left_out] == [("sent twice; the first update counts",)]


def test_presumed_bad_updates_are_rounded_up_but_not_by_rounding():
    assert [Screening("multi_krum", bad_share=0.07).bad(k) for k in (100, 101)] == [7, 8]
    assert Screening("geometric_median").shortfall(1) == ""


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"robust": "krum"}, "federation.robust: input should be 'clip', 'multi_krum'"),
        ({"robust": "multi_krum"}, "federation.bad_share: needed by robust = 'multi_krum'"),
        ({"robust": "clip", "bad_share": 0.1}, "federation.bad_share: needed by robust"),
        ({"bad_share": 0.1}, "federation.bad_share: needed by robust"),
        ({"robust": "trimmed_mean", "bad_share": 0.5}, "federation.bad_share: input should be"),
        ({"clip_norm": 1.0}, "federation.clip_norm: only with robust = 'clip'"),
        ({"robust": "clip", "clip_norm": 0.0}, "federation.clip_norm: input should be greater"),
        (
            {"robust": "multi_krum", "bad_share": 0.2, "clients_per_round": 6},
            "federation.clients_per_round: multi_krum needs 2 f + 3 = 7 updates, f = 2 of 6",
        ),
        (
            {"robust": "trimmed_mean", "bad_share": 0.2, "clients_per_round": 6, "min_updates": 5},
            "federation.min_updates: 5 cannot be left of 6",
        ),
    ],
)
def test_rules_that_cannot_be_are_refused(document, table, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(document | {"federation": table}, "test")
    assert message in str(caught.value)


def test_a_rule_that_rejects_nobody_does_not_go_with_adapters_that_clients_keep(document):
    changes = {"federation": {"robust": "clip"}, "method": {"next_adapter": "keep"}}
    with pytest.raises(RecipeError, match=r"federation\.robust: clip rejects nobody"):
        parse_recipe(document | changes, "test")


def test_what_a_run_cannot_do_is_refused_before_anything_is_written(document, tmp_path):
    document["federation"] |= {"robust": "multi_krum", "bad_share": 0.1}
    with pytest.raises(RecipeError, match=r"2 f \+ 3 = 5 updates, f = 1 of 3"):
        run(parse_recipe(document, "test"), tmp_path / "run")
    document["federation"] = {"robust": "clip"}
    with pytest.raises(RecipeError, match="--keep-updates: a clipped update counts in part"):
        run(parse_recipe(document, "test"), tmp_path / "run", keep_updates=True)
    assert not (tmp_path / "run").exists()


def test_kept_updates_have_the_weights_of_the_rule(document, tmp_path):
    document["federation"] |= {"robust": "geometric_median", "rounds": 1}
    done = run(parse_recipe(document, "test"), tmp_path / "run", keep_updates=True)
    (record,) = done.records
    folder = tmp_path / "run" / "updates" / "round-0001"
    weights = [
        json.loads((folder / c.client / "client.json").read_text())["weight"]
        for c in record.clients
    ]
    assert [c.weight for c in record.clients] == pytest.approx([w / sum(weights) for w in weights])
    assert "screen" in record.seconds


def unbalanced(model, gauge):
    """A change of what site-2 sends: the same products, of other factors."""

    def change(update):
        if update.client != "site-2":
            return update
        sizes = {"A/": 1.0 / gauge, "B/": gauge, "de": 1.0}
        tensors = {name: sizes[name[:2]] * t for name, t in update.tensors.items()}
        return random_update(model, 1, "site-2", tensors=tensors, num_examples=3)

    return change


def test_without_a_rule_an_extreme_gauge_stops_the_run_and_names_the_client():
    """Its product is like the others'; its factors are beyond what a float32 mean can hold."""
    model = AdaptedModel(adapted("roberta"))
    parts, state = screened(model, None, attacked(model, {}, {}, unbalanced(model, 1e6)))
    with pytest.raises(ExactnessError, match="round 1: the applied update is not") as caught:
        run_round(parts, state)
    blamed = [fault for fault in caught.value.faults if fault.startswith("client")]
    assert len(blamed) == 1
    assert blamed[0].startswith("client site-2: its factors B and A are so unlike the others'")
    way = """to go on without: --resume --set 'federation.exclude=["site-2"]'"""
    assert caught.value.faults[-1] == way


@pytest.mark.parametrize("gauge", [1e-6, 60.0, 1e3, 1e6])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_rejects_an_extreme_gauge_and_the_rest_is_exact(rule, gauge):
    """Beside a client that the rule itself has to stand."""
    model, sent = AdaptedModel(adapted("roberta")), {}
    script = attacked(model, sent, {"site-0": 100.0}, unbalanced(model, gauge))
    parts, state = screened(model, RULES[rule], script)
    _, record = run_round(parts, state)
    assert record.certificate.held
    reasons = {c.client: c.reasons[0] for c in record.left_out}
    assert reasons["site-2"].startswith("its factors B and A are so unlike")
    shares = {c.client: c.weight for c in record.clients}
    assert sum(shares.values()) + record.stay == pytest.approx(1.0)
    for name in model.modules:
        start = state.adapter[name].to(torch.float64).product()
        products = {
            c: sent[1, c].tensors[f"B/{name}"].double() @ sent[1, c].tensors[f"A/{name}"].double()
            for c in shares
        }
        ideal = record.stay * start + sum(w * products[c] for c, w in shares.items())
        ideal = ideal * model.spec.modules[name].scaling
        assert float((live_update(model, name) - ideal).norm()) <= 1e-6 * float(ideal.norm())
