"""A registered node that comes back under other names has one vote, and the rules hold."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from fedexlora.errors import NoUpdatesError
from fedexlora.exchange.delivery import receive
from fedexlora.exchange.update import largest_update
from fedexlora.flower import transport as module
from fedexlora.flower.announcement import announced
from fedexlora.flower.frames import Frame
from fedexlora.flower.names import Names
from fedexlora.flower.transport import FlowerTransport
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.screening import Screening
from tests.flower.nodes import FakeGrid
from tests.models import adapted, live_update
from tests.rounds.scripted import federation, random_update, run_round

HONEST = tuple(f"site-{i}" for i in range(6))
BAD = 66
"""The node that takes ten names."""
ROUNDS = 3
RULES = {
    "clip": Screening("clip"),
    "multi_krum": Screening("multi_krum", bad_share=0.14),
    "trimmed_mean": Screening("trimmed_mean", bad_share=0.14),
}


def noise(seed: int, tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))


def client(model: AdaptedModel, name, factor: float):
    """A node that sends the common change of a round, its own on top, times ``factor``."""
    held = []

    def answer(frame: Frame) -> Frame:
        if frame.header["kind"] == "hello":
            return Frame({"client": name(), "rows": 4})
        held[:] = [receive(held[0] if held else None, announced(frame), frame.parts["message"])]
        state, round_ = held[0], frame.header["round"]
        tensors = {}
        for key, pair in state.adapter.items():
            tensors[f"A/{key}"] = pair.A
            step = 0.05 * noise(round_, pair.B) + 0.01 * noise(sum(name().encode()), pair.B)
            tensors[f"B/{key}"] = pair.B + factor * step
        for key, tensor in state.dense.items():
            tensors[f"dense/{key}"] = tensor + 0.01 * factor * noise(round_, tensor)
        update = random_update(
            model, round_, name(), tensors=tensors, num_examples=4, version=state.id
        )
        return Frame({"seconds": 0.0}, {"update": update.encode()})

    return answer


class Held(FlowerTransport):
    """What ``run_round`` of the tests keeps from one round to the next."""

    holdings = None


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)


def played(rule: str, path, *, attacked: bool):
    """Rounds before each of which the bad node, if there is one, comes and goes under ten names."""
    model = AdaptedModel(adapted("roberta"))
    grid = FakeGrid({i: client(model, lambda n=name: n, 1.0) for i, name in enumerate(HONEST)})
    grid.keys = {**{i: name.encode() for i, name in enumerate(HONEST)}, BAD: b"one key"}
    now = [""]

    def again(name: str) -> None:
        grid.nodes.pop(BAD, None)
        transport._look()
        now[0] = name
        grid.nodes[BAD] = client(model, lambda: now[0], -40.0)
        transport._look()
        for _ in transport._pull():
            pass

    transport = Held(
        grid,
        {},
        model.base_fingerprint,
        largest_update=largest_update(model.spec),
        names=Names(path),
    )
    parts, state = federation(model, "fedex", transport=transport, screening=RULES[rule])
    path.parent.mkdir()
    transport.gather(len(HONEST), 5.0)
    records = []
    for _ in range(ROUNDS):
        for i in (*range(10), 0) if attacked else ():
            again(f"evil-{i}")
            assert sum("evil" in name for name in transport.clients) == (i == 0)
        state, record = run_round(parts, state)
        records.append(record)
    return model, records


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("rule", RULES)
def test_rules_hold_against_a_node_that_comes_back_under_ten_names(rule, tmp_path):
    model, records = played(rule, tmp_path / "attacked" / "c.jsonl", attacked=True)
    honest, _ = played(rule, tmp_path / "honest" / "c.jsonl", attacked=False)
    votes = [vote.client for r in records for vote in (*r.clients, *r.left_out)]
    assert {name for name in votes if name not in HONEST} == {"evil-0"}
    assert votes.count("evil-0") == ROUNDS
    assert all(record.registered <= len(HONEST) + 1 for record in records)
    assert all(record.certificate.held for record in records)
    for name in model.modules:
        found, ideal = (live_update(m, name) for m in (model, honest))
        assert float((found - ideal).norm()) <= 0.5 * float(ideal.norm())


@pytest.mark.usefixtures("quick")
def test_a_client_that_has_gone_is_not_drawn(tmp_path):
    model = AdaptedModel(adapted("roberta"))
    grid = FakeGrid({i: client(model, lambda n=name: n, 1.0) for i, name in enumerate(HONEST)})
    transport = Held(grid, {}, model.base_fingerprint, largest_update=largest_update(model.spec))
    parts, state = federation(model, "fedex", transport=transport)
    transport.gather(len(HONEST), 5.0)
    del grid.nodes[2]
    transport._look()
    after, record = run_round(parts, state)
    assert {c.client for c in record.clients} == set(HONEST) - {"site-2"}
    assert (record.left_out, record.registered) == ((), len(HONEST) - 1)
    grid.nodes.clear()
    transport._look()
    with pytest.raises(NoUpdatesError, match="round 2: no client is connected"):
        run_round(parts, after)


@pytest.mark.usefixtures("quick")
def test_an_update_of_other_rows_than_were_declared_is_refused_and_a_new_greeting_declares_anew():
    model, rows = AdaptedModel(adapted("roberta")), [4]
    honest = client(model, lambda: "site-0", 1.0)

    def greedy(frame: Frame) -> Frame:
        if frame.header["kind"] == "hello":
            return Frame({"client": "site-0", "rows": rows[0]})
        return honest(frame)

    grid = FakeGrid({0: greedy, 1: client(model, lambda: "site-1", 1.0)})
    transport = Held(grid, {}, model.base_fingerprint, largest_update=largest_update(model.spec))
    parts, state = federation(model, "fedex", transport=transport)
    rows[0] = 3
    transport.gather(2, 5.0)
    state, record = run_round(parts, state)
    (out,) = record.left_out
    assert (out.client, out.reasons) == (
        "site-0",
        ("num_examples: expected the 3 declared, found 4",),
    )
    del grid.nodes[0]
    transport._look()
    rows[0] = 4
    grid.nodes[0] = greedy
    transport.gather(2, 5.0)
    _, record = run_round(parts, state)
    assert [c.num_examples for c in record.clients] == [4, 4]


@pytest.mark.usefixtures("quick")
def test_thousands_of_nodes_are_greeted_in_groups_and_pulled_in_small_batches(caplog):
    """Half of them refuse, one never answers; what is said of them fits on a screen."""
    nodes, pulled = 1300, []

    def node(i: int):
        if i == 0:
            return lambda _: None
        if i % 2:
            return lambda _: Frame({"failure": "model-refused"})
        return lambda _: Frame({"client": f"site-{i}", "rows": 4})

    grid = FakeGrid({i: node(i) for i in range(nodes)})
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: pulled.append(len(ids)) or pull(ids)
    transport = FlowerTransport(grid, {}, "base", largest_update=10)
    greeted = []
    for _ in range(nodes):
        before = len(grid.pushed)
        transport._look()
        greeted.append(len(grid.pushed) - before)
        for _ in transport._pull():
            pass
        if len(grid.pushed) == nodes:
            break
    assert max(greeted) == 256
    assert len(transport.clients) == nodes // 2 - 1
    assert max(pulled) <= 32
    faults = transport._members.faults
    assert len(faults) == 2
    assert "node 1, 3, 5 and 647 more: the recipe's model" in faults[1]
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 501


def test_nodes_are_looked_for_more_and_more_rarely_until_one_comes_or_goes(monkeypatch):
    clock, looked = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    grid = FakeGrid({7: lambda _: Frame({"client": "north", "rows": 4})})
    monkeypatch.setattr(grid, "get_node_ids", lambda: looked.append(clock[0]) or list(grid.nodes))
    transport = FlowerTransport(grid, {}, "base", largest_update=10)
    for second in range(600):
        clock[0] = float(second)
        if second == 400:
            grid.nodes[8] = grid.nodes[7]
        transport._look()
    pauses = [after - before for before, after in pairwise(looked)]
    assert pauses[0] == 5.0
    assert max(pauses) == 30.0
    came = next(i for i, t in enumerate(looked) if t >= 400)
    assert pauses[came] == 5.0


def test_a_silent_node_does_not_hold_up_the_others_for_ever(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    grid = FakeGrid(dict.fromkeys(range(300), lambda _: None))
    transport = FlowerTransport(grid, {}, "base", largest_update=10)
    transport._look()
    assert len(grid.pushed) == 256
    clock[0] = 601.0
    transport._look()
    assert len(grid.pushed) == 300
