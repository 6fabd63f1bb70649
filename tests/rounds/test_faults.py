"""Clients that fail are left out and named; the aggregate is that of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedexlora.errors import BridgeError, ExactnessError, NoUpdatesError, RunError
from fedexlora.exchange.history import History, Holdings
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.transport import Reply
from tests.models import adapted, live_update, lora_layers
from tests.rounds.scripted import (
    OTHER,
    WEIGHTS,
    Scripted,
    federation,
    random_update,
    replies,
    run_round,
)


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


def flipped(message: bytes) -> bytes:
    """One bit of the last tensor."""
    return message[:-1] + bytes([message[-1] ^ 1])


FAULTS = {
    "raises": (lambda u: [Reply(u.client, 1, failure="OutOfMemoryError: 3 GB")], "OutOfMemory"),
    "nan": (lambda u: spoiled(u, float("nan")), "values are not finite"),
    "inf": (lambda u: spoiled(u, float("inf")), "values are not finite"),
    "overflow": (lambda u: spoiled(u, 1e30), "expected values of at most 1e+15, found 1e+30"),
    "loss": (lambda u: replies(changed(u, loss=float("nan"))), "loss: expected a finite number"),
    "zero weight": (lambda u: replies(changed(u, num_examples=0)), "num_examples: expected at"),
    "negative weight": (lambda u: replies(changed(u, num_examples=-2)), "num_examples"),
    "truncated": (lambda u: [Reply(u.client, 1, u.encode()[:-9])], "not a safetensors"),
    "stale": (lambda u: replies(changed(u, version=OTHER)), "version: expected '"),
    "other base": (lambda u: replies(changed(u, base="other")), "base: expected '"),
    "other rank": (
        lambda u: replies(changed(u, tensors=at_rank(u, 5))),
        "expected float32 [3, 24]",
    ),
    "other module": (
        lambda u: replies(changed(u, tensors={f"{n}x": t for n, t in u.tensors.items()})),
        "unexpected",
    ),
    "damaged on the way": (lambda u: [Reply(u.client, 1, flipped(u.encode()))], "checksum"),
    "no message at all": (lambda u: [Reply(u.client, 1, b"")], "not a safetensors"),
    "impersonates another": (
        lambda u: [Reply(u.client, 1, changed(u, client="site-a").encode())],
        "client: expected 'site-b', found 'site-a'",
    ),
    "another round": (
        lambda u: [Reply(u.client, 1, changed(u, round=7).encode())],
        "round: expected 1, found 7",
    ),
    "weight of everybody": (
        lambda u: replies(changed(u, num_examples=10**400)),
        "num_examples: expected at most 9007199254740992, found 1000",
    ),
    "text that cannot be written": (
        lambda u: [Reply(u.client, 1, failure="no file \udcff\u2028 here")],
        "no file \\udcff",
    ),
    "dies between training and sending": (lambda u: u.encode() and [], "it did not answer"),
    "silent": (lambda u: [], "it did not answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rest_is_aggregated_exactly_and_the_record_names_the_client(fault):
    make, reason = FAULTS[fault]
    model = AdaptedModel(adapted("roberta"))
    parts, state = federation(model, "fedex", with_fault(model, make))
    _, record = run_round(parts, state)
    assert [c.client for c in record.clients] == ["site-a", "site-c"]
    assert [c.weight for c in record.clients] == [1 / 6, 5 / 6]
    assert [c.client for c in record.left_out] == ["site-b"]
    assert reason in "".join(record.left_out[0].reasons)
    assert record.certificate.held
    applies_the_mean_of(model, 1, "site-a", "site-c")


def applies_the_mean_of(model: AdaptedModel, round_: int, *clients: str) -> None:
    """In the first round the ideal is the mean product of these clients alone, in float64."""
    shares = [WEIGHTS[client] for client in clients]
    good = [random_update(model, round_, client).tensors for client in clients]
    for name, layer in lora_layers(model.peft_model):
        ideal = layer.scaling["default"] * sum(
            share / sum(shares) * (u[f"B/{name}"].double() @ u[f"A/{name}"].double())
            for share, u in zip(shares, good, strict=True)
        )
        assert float((live_update(model, name) - ideal).norm()) <= 2e-6 * float(ideal.norm())


def test_a_second_update_of_a_client_does_not_count():
    model = AdaptedModel(adapted("roberta"))
    parts, state = federation(model, "fedex", with_fault(model, lambda u: replies(u, u)))
    _, record = run_round(parts, state)
    assert [c.weight for c in record.clients] == [1 / 8, 2 / 8, 5 / 8]
    assert record.left_out[0].reasons == ("sent twice; the first update counts",)
    assert record.certificate.held


def test_the_largest_values_that_are_accepted_are_aggregated_exactly():
    model = AdaptedModel(adapted("roberta"))

    def largest(update):
        tensors = {n: torch.full_like(t, 1e15) for n, t in update.tensors.items()}
        return replies(changed(update, tensors=tensors))

    parts, state = federation(model, "fedex", with_fault(model, largest))
    _, record = run_round(parts, state)
    assert len(record.clients) == 3
    assert record.certificate.held


def test_a_good_update_counts_though_a_damaged_one_came_before():
    model = AdaptedModel(adapted("roberta"))

    def again(update):
        return [Reply(update.client, 1, update.encode()[:-9]), *replies(update)]

    parts, state = federation(model, "fedex", with_fault(model, again))
    _, record = run_round(parts, state)
    assert [c.client for c in record.clients] == list(WEIGHTS)
    assert [c.client for c in record.left_out] == ["site-b"]
    applies_the_mean_of(model, 1, *WEIGHTS)


def test_a_client_cannot_speak_for_another_one():
    """It sends another one's update as its own; that one's counts once."""
    model = AdaptedModel(adapted("roberta"))

    def stolen(update):
        return [Reply("site-b", 1, random_update(model, 1, "site-c").encode())]

    parts, state = federation(model, "fedex", with_fault(model, stolen))
    _, record = run_round(parts, state)
    assert [c.client for c in record.clients] == ["site-a", "site-c"]
    assert record.left_out[0].reasons == ("client: expected 'site-b', found 'site-c'",)
    applies_the_mean_of(model, 1, "site-a", "site-c")


class Unreachable(Scripted):
    """One client takes no message in the rounds that are named; it may send all the same."""

    def __init__(self, script, rounds, error: Exception, *, sends: bool = False) -> None:
        super().__init__(script)
        self._rounds, self._error, self._sends = rounds, error, sends

    def ask(self, round_, client, delivery):
        if client == "site-b" and round_ in self._rounds:
            self.held.pop(client, None)
            raise self._error
        super().ask(round_, client, delivery)

    def replies(self, round_, deadline, progress):
        yield from super().replies(round_, deadline, progress)
        if self._sends and round_ in self._rounds:
            yield from self._script(round_, "site-b", None)


@pytest.mark.parametrize("sends", [False, True])
@pytest.mark.parametrize(
    "error", [RunError("it holds another model"), ConnectionResetError("reset"), TimeoutError()]
)
def test_a_client_that_cannot_be_brought_to_the_version_is_left_out(error, sends):
    model = AdaptedModel(adapted("roberta"))

    def script(round_, client, held):
        return replies(random_update(model, round_, client))

    transport = Unreachable(script, {1}, error, sends=sends)
    parts, state = federation(model, "fedex", transport=transport)
    state, first = run_round(parts, state)
    assert [c.client for c in first.clients] == ["site-a", "site-c"]
    wanted = [(str(error) or "TimeoutError",)]
    wanted += [("it was not brought to the round's version",)] if sends else []
    assert [c.reasons for c in first.left_out] == wanted
    assert first.left_out[0].downloaded_bytes > 0
    applies_the_mean_of(model, 1, "site-a", "site-c")
    _, second = run_round(parts, state)
    assert [c.since for c in second.clients] == [0, None, 0], "it gets the total"
    assert second.certificate.held


@pytest.mark.parametrize("fate", ["wiped", "old", "of another history"])
def test_a_client_that_comes_back_with_another_state_trains_on_the_right_one(fate):
    model = AdaptedModel(adapted("roberta"))
    started = []

    def script(round_, client, held):
        started.append(held.id)
        return replies(random_update(model, round_, client))

    parts, state = federation(model, "fedex", script)
    old = state
    for _ in range(2):
        state, _ = run_round(parts, state)
    transport = parts.transport
    held = transport.held["site-b"]
    if fate == "of another history":
        transport.held["site-b"] = replace(held, id=OTHER)
    elif fate == "old":
        transport.held["site-b"] = old
    else:
        del transport.held["site-b"]
    started.clear()
    transport.delivered.clear()
    _, record = run_round(parts, state)
    assert set(started) == {state.id}
    assert [c.client for c in record.clients] == list(WEIGHTS)
    sizes = [size for client, size in transport.delivered if client == "site-b"]
    assert len(sizes) == 2, "the step, which does not fit, and then a snapshot"
    assert record.clients[1].downloaded_bytes == sum(sizes)
    assert not record.left_out
    assert record.certificate.held


def test_what_a_client_names_its_tensors_cannot_spoil_the_record(tmp_path):
    """Characters that end a line for some readers, or move a terminal's cursor, are escaped."""
    model = AdaptedModel(adapted("roberta"))
    names = ["a\u2028b", "\x85", "\0\n", '"', "\x1b[31m"]

    def fault(update):
        strange = {name: torch.ones(1) for name in names}
        return replies(changed(update, tensors=dict(update.tensors) | strange))

    folder = RunFolder(tmp_path)
    (tmp_path / "versions").mkdir()
    parts, begun = federation(model, "fedex", with_fault(model, fault))
    parts.transport.holdings = Holdings({}, History(4, folder.store, {0: begun.id}))
    folder.begin(begun, parts.transport.holdings)
    state, record = run_round(parts, begun)
    assert set(record.left_out[0].reasons) == {
        f"{name}: unexpected" for name in ("a\\u2028b", "\\x85", "\\x00\\n", '"', "\\x1b[31m")
    }
    folder.save(state, parts.transport.holdings, record)
    assert list(folder.load().records) == list(folder.read_records(1)) == [record]


def test_without_any_update_the_round_stops_and_names_everyone():
    model = AdaptedModel(adapted("roberta"))

    def script(round_, client, held):
        return [Reply(client, round_, failure="went away")]

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
