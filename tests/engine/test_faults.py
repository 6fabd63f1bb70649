"""Clients that fail are left out and named; the aggregate is that of the others."""

from __future__ import annotations

import pytest
import torch

from fedexlora.engine.transport import Reply
from fedexlora.errors import BridgeError, ExactnessError, NoUpdatesError
from fedexlora.peft_bridge.model import AdaptedModel
from tests.engine.scripted import WEIGHTS, federation, random_update, replies, run_round
from tests.models import adapted, lora_layers


def with_fault(model: AdaptedModel, fault):
    """Clients a and c are good; b replies with ``fault(good update)``."""

    def script(round_, client, held):
        update = random_update(model, round_, client)
        return fault(update) if client == "site-b" else replies(update)

    return script


def spoiled(update, value: float):
    name = next(name for name in update.tensors if name.startswith("B/"))
    tensor = update.tensors[name].clone()
    tensor[0, 0] = value
    return replies(changed(update, tensors=dict(update.tensors) | {name: tensor}))


def changed(update, **changes):
    fields = ("client", "round", "version", "num_examples", "loss", "base", "tensors")
    return type(update)(**({f: getattr(update, f) for f in fields} | changes))


def at_rank(update, rank: int):
    return {
        name: torch.ones(rank, tensor.shape[1]) if name.startswith("A/") else tensor
        for name, tensor in update.tensors.items()
    }


FAULTS = {
    "raises": (lambda u: [Reply(u.client, None, "OutOfMemoryError: 3 GB", 0.1)], "OutOfMemory"),
    "nan": (lambda u: spoiled(u, float("nan")), "values are not finite"),
    "inf": (lambda u: spoiled(u, float("inf")), "values are not finite"),
    "loss": (lambda u: replies(changed(u, loss=float("nan"))), "loss: expected a finite number"),
    "zero weight": (lambda u: replies(changed(u, num_examples=0)), "num_examples: expected at"),
    "negative weight": (lambda u: replies(changed(u, num_examples=-2)), "num_examples"),
    "truncated": (lambda u: [Reply(u.client, u.encode()[:-9], "", 0.1)], "not a safetensors"),
    "stale": (lambda u: replies(changed(u, version=7)), "version: expected 0, found 7"),
    "other base": (lambda u: replies(changed(u, base="other")), "base: expected '"),
    "other rank": (
        lambda u: replies(changed(u, tensors=at_rank(u, 5))),
        "expected float32 [3, 24]",
    ),
    "other module": (
        lambda u: replies(changed(u, tensors={f"{n}x": t for n, t in u.tensors.items()})),
        "unexpected",
    ),
    "silent": (lambda u: [], None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rest_is_aggregated_exactly_and_the_record_names_the_client(fault):
    make, reason = FAULTS[fault]
    model = AdaptedModel(adapted("roberta"))
    parts, state = federation(model, "fedex", with_fault(model, make))
    _, record = run_round(parts, state)
    assert [c.client for c in record.clients] == ["site-a", "site-c"]
    assert [c.weight for c in record.clients] == [1 / 6, 5 / 6]
    assert [c.client for c in record.left_out] == (["site-b"] if reason else [])
    if reason:
        assert reason in "".join(record.left_out[0].reasons)
    assert record.certificate.held
    good = [random_update(model, 1, c).tensors for c in ("site-a", "site-c")]
    for name, layer in lora_layers(model.peft_model):
        products = [u[f"B/{name}"].double() @ u[f"A/{name}"].double() for u in good]
        ideal = layer.scaling["default"] * (products[0] + 5 * products[1]) / 6
        assert float((model.applied(name).dense() - ideal).norm()) <= 2e-6 * float(ideal.norm())


def test_a_second_update_of_a_client_does_not_count():
    model = AdaptedModel(adapted("roberta"))
    parts, state = federation(model, "fedex", with_fault(model, lambda u: replies(u, u)))
    _, record = run_round(parts, state)
    assert [c.weight for c in record.clients] == [1 / 8, 2 / 8, 5 / 8]
    assert record.left_out[0].reasons == ("sent twice; the first update counts",)
    assert record.certificate.held


def test_without_any_update_the_round_stops_and_names_everyone():
    model = AdaptedModel(adapted("roberta"))

    def script(round_, client, held):
        return [Reply(client, None, "went away", 0.0)]

    parts, state = federation(model, "fedex", script)
    with pytest.raises(NoUpdatesError, match="round 1") as caught:
        run_round(parts, state)
    assert caught.value.faults == tuple(f"{client}: went away" for client in WEIGHTS)


def test_a_model_that_does_not_apply_the_ideal_stops_the_run(monkeypatch):
    model = AdaptedModel(adapted("roberta"))
    parts, state = federation(model, "fedex")
    apply = model.apply

    def apply_and_slip(new):
        apply(new)
        with torch.no_grad():
            next(iter(model.modules.values())).weight[0, 0] += 1e-2

    monkeypatch.setattr(model, "apply", apply_and_slip)
    with pytest.raises(ExactnessError, match="round 1: the applied update is not") as caught:
        run_round(parts, state)
    assert len(caught.value.faults) == 1
    assert next(iter(model.modules)) in caught.value.faults[0]


def test_a_state_of_another_model_is_refused_and_nothing_is_applied():
    model, other = AdaptedModel(adapted("roberta")), AdaptedModel(adapted("roberta-biases"))
    weights = {name: p.clone() for name, p in model.peft_model.named_parameters()}
    with pytest.raises(BridgeError, match="does not belong to this model") as caught:
        model.apply(other.initial_state())
    assert len(caught.value.faults) > 1
    for name, parameter in model.peft_model.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_bytes_in_the_record_are_the_lengths_of_the_messages():
    model = AdaptedModel(adapted("roberta"))
    sent = []

    def script(round_, client, held):
        found = replies(random_update(model, round_, client))
        sent.extend(len(reply.message) for reply in found)
        return found

    parts, state = federation(model, "fedex", script)
    state, first = run_round(parts, state)
    parts.transport.delivered.clear()
    sent.clear()
    _, record = run_round(parts, state)
    assert record.bytes.up == sum(sent)
    assert record.bytes.down == sum(size for _, size in parts.transport.delivered)
    assert [c.downloaded_bytes for c in record.clients] == [
        size for _, size in parts.transport.delivered
    ]
    assert [c.since for c in first.clients] == [None] * 3
    assert [c.since for c in record.clients] == [0] * 3


def test_a_download_is_at_most_k_times_the_factors_or_dense():
    model = AdaptedModel(adapted("gpt2-patterns"))
    parts, state = federation(model, "fedex")
    state, _ = run_round(parts, state)
    _, record = run_round(parts, state)
    numbers = sum(
        m.rank * (m.d_in + m.d_out) + min(2 * m.rank * (m.d_in + m.d_out), m.d_in * m.d_out)
        for m in model.spec.modules.values()
    )
    header = 200 * 4 * len(model.modules)
    assert all(c.downloaded_bytes <= 4 * numbers + header for c in record.clients)
