"""Holders that sum in different ways hold the same live model, and never take a second snapshot."""

from __future__ import annotations

import pytest
import torch

from fedexlora.exchange.delivery import Delivery, deliver
from fedexlora.exchange.history import History, Holdings
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.participation import Participation
from tests.exchange.test_holders import dense, in_threads, perturbed, plain, reordered
from tests.exchange.versions import taken
from tests.models import adapted, live_update
from tests.rounds.scripted import WEIGHTS, Scripted, federation, random_update, replies, run_round

ROUNDS = 20


class Differing(Scripted):
    """``site-c`` does as it likes with its sums before it adds more."""

    def __init__(self, script, way) -> None:
        super().__init__(script)
        self._ways = {"site-c": way}
        self.snapshots: list[str] = []
        self.asks: list[str] = []

    def ask(self, round_: int, client: str, delivery: Delivery) -> None:
        self.asks.append(client)
        if delivery.announced.snapshot is not None:
            self.snapshots.append(client)
        threads = torch.get_num_threads()
        try:
            if client in self.held:
                self.held[client] = self._ways.get(client, plain)(self.held[client])
            super().ask(round_, client, delivery)
        finally:
            torch.set_num_threads(threads)


def largest_difference(model: AdaptedModel, one, other) -> float:
    """Of what two holders' live models add to the base, by module, relative to it."""
    applied = []
    for held in (one, other):
        model.apply(held)
        applied.append({name: live_update(model, name) for name in model.modules})
    return max(float((x - applied[1][n]).norm() / x.norm()) for n, x in applied[0].items())


@pytest.mark.exactness
@pytest.mark.parametrize("placement", ["auto", "side"])
@pytest.mark.parametrize("way", [perturbed, dense, reordered, in_threads], ids=lambda w: w.__name__)
def test_live_models_agree_after_twenty_rounds_and_nobody_takes_a_second_snapshot(way, placement):
    model = AdaptedModel(adapted("llama-rslora"), placement=placement)

    def script(round_, client, held):
        return replies(random_update(model, round_, client))

    transport = Differing(script, way)
    rule = Participation(clients_per_round=2)
    parts, state = federation(model, "fedex", transport=transport, participation=rule)
    transport.holdings = Holdings({}, History(ROUNDS))
    for _ in range(ROUNDS):
        state, record = run_round(parts, state)
        assert record.certificate.held
        assert not record.left_out
    assert sorted(transport.snapshots) == sorted(WEIGHTS), "one each, their first"
    asked = transport.asks.count("site-c")
    assert 5 < asked < ROUNDS, "it skips rounds"
    history = transport.holdings.history
    held = [transport.held[client] for client in ("site-a", "site-c")]
    deliveries = [deliver(history, state, found.version) for found in held]
    assert not any(delivery.announced.snapshot for delivery in deliveries)
    met = [taken(*pair) for pair in zip(held, deliveries, strict=True)]
    assert met[0].id == met[1].id == state.id
    for name in model.modules:
        sums = [held.total[name].dense() for held in met]
        assert float((sums[0] - sums[1]).norm() / sums[0].norm()) < 1e-8
    assert largest_difference(model, *met) < 2e-7
