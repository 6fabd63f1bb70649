"""The updates of an open round on disk: what is whole is used, what is not is asked for again."""

from __future__ import annotations

import json

import pytest
import torch

from fedexlora.errors import NoUpdatesError, RunError
from fedexlora.exchange.records import ClientRecord
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.common_update import CommonForm, HeldUpdate
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.participation import AccessList, Participation
from fedexlora.rounds.spool import Spool
from tests.models import adapted, live_update
from tests.rounds.scripted import OTHER, federation, random_update, replies, run_round

CASE = "llama-rslora"


class Noted(Observer):
    """Keeps what was passed over."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def passed_over(self, fault: str) -> None:
        self.faults.append(fault)


def asked_of(parts) -> list[str]:
    return [client for client, _ in parts.transport.delivered]


def interrupted(model, folder, missing=("site-c",), **changes):
    """A round in which some clients do not answer, and which too few updates therefore stop."""

    def script(round_, client, held):
        return [] if client in missing else replies(random_update(model, round_, client))

    rule = Participation(min_updates=3)
    parts, state = federation(model, "fedex", script, participation=rule, spool=folder, **changes)
    with pytest.raises(NoUpdatesError):
        run_round(parts, state)
    return state


def test_who_has_delivered_is_not_asked_again_and_the_round_ends_as_if_nothing_had_happened(
    tmp_path,
):
    model, undisturbed = AdaptedModel(adapted(CASE)), AdaptedModel(adapted(CASE))
    interrupted(model, tmp_path / "spool")
    parts, state = federation(model, "fedex", spool=tmp_path / "spool")
    after, record = run_round(parts, state)
    assert asked_of(parts) == ["site-c"]
    others, first = federation(undisturbed, "fedex")
    wanted, whole = run_round(others, first)
    assert after.id == wanted.id
    assert record.model_dump(exclude={"seconds"}) == whole.model_dump(exclude={"seconds"})
    for name in model.modules:
        assert torch.equal(live_update(model, name), live_update(undisturbed, name))
    assert parts.transport.holdings.versions == dict.fromkeys(("site-a", "site-b", "site-c"), 0)


def test_the_draw_stands_whoever_is_connected_when_the_server_comes_back(tmp_path):
    model = AdaptedModel(adapted(CASE))
    rule = Participation(clients_per_round=2, min_updates=2)

    def silent(round_, client, held):
        return []

    parts, state = federation(
        model, "fedex", silent, participation=rule, spool=tmp_path / "spool", seed=3
    )
    with pytest.raises(NoUpdatesError):
        run_round(parts, state)
    drawn = asked_of(parts)
    parts, state = federation(model, "fedex", participation=rule, spool=tmp_path / "spool", seed=99)
    parts.transport.clients = ("site-a", "site-b", "site-c", "site-d")
    _, record = run_round(parts, state)
    assert [c.client for c in record.clients] == drawn == asked_of(parts)


def test_a_client_that_is_shut_out_meanwhile_does_not_count(tmp_path):
    model = AdaptedModel(adapted(CASE))
    interrupted(model, tmp_path / "spool")
    parts, state = federation(
        model, "fedex", spool=tmp_path / "spool", access=AccessList(exclude=("site-a",))
    )
    _, record = run_round(parts, state)
    assert [c.client for c in record.clients] == ["site-b", "site-c"]
    assert asked_of(parts) == ["site-c"]


def spoil(way, folder):
    path = folder / "site-b.safetensors"
    content = path.read_bytes()
    if way == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif way == "half of it written":
        path.rename(folder / ".site-b.safetensors.tmp")
    elif way == "one bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "another client's":
        path.write_bytes((folder / "site-a.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("cut off", "not a whole safetensors file"),
        ("half of it written", None),
        ("one bit", "has not the checksum"),
        ("empty", "not a whole safetensors file"),
        ("another client's", "it is an update of 'site-a'"),
    ],
)
def test_a_damaged_file_is_named_and_its_client_asked_again(way, said, tmp_path):
    model, noted = AdaptedModel(adapted(CASE)), Noted()
    interrupted(model, tmp_path / "spool")
    spoil(way, tmp_path / "spool")
    parts, state = federation(model, "fedex", spool=tmp_path / "spool", observer=noted)
    _, record = run_round(parts, state)
    assert sorted(asked_of(parts)) == ["site-b", "site-c"]
    assert len(record.clients) == 3
    if said is None:
        assert not noted.faults
    else:
        (fault,) = noted.faults
        assert "site-b.safetensors is passed over" in fault
        assert said in fault


@pytest.mark.parametrize("field", ["round", "version"])
def test_updates_of_another_round_or_of_one_that_was_rolled_back_are_not_used(field, tmp_path):
    model = AdaptedModel(adapted(CASE))
    interrupted(model, tmp_path / "spool")
    draw = tmp_path / "spool" / "draw.json"
    said = json.loads(draw.read_text()) | {field: 7 if field == "round" else OTHER}
    draw.write_text(json.dumps(said))
    parts, state = federation(model, "fedex", spool=tmp_path / "spool")
    _, record = run_round(parts, state)
    assert asked_of(parts) == ["site-a", "site-b", "site-c"]
    assert len(record.clients) == 3


def test_a_full_disk_stops_the_round_by_name_and_what_had_come_counts_afterwards(
    tmp_path, monkeypatch
):
    model = AdaptedModel(adapted(CASE))
    add = Spool.add

    def full(self, tensors, record, *, landed):
        if record.client == "site-b":
            raise OSError(28, "No space left on device")
        return add(self, tensors, record, landed=landed)

    parts, state = federation(model, "fedex", spool=tmp_path / "spool")
    monkeypatch.setattr(Spool, "add", full)
    with pytest.raises(RunError, match="spool cannot be written: No space left"):
        run_round(parts, state)
    monkeypatch.undo()
    parts, state = federation(model, "fedex", spool=tmp_path / "spool")
    run_round(parts, state)
    assert asked_of(parts) == ["site-b", "site-c"]


def test_files_of_one_layout_share_their_places_and_none_is_open(tmp_path):
    model = AdaptedModel(adapted(CASE))
    state = model.initial_state()
    form = CommonForm(state, model.spec, {})
    spool = Spool(tmp_path / "spool", 1, form)
    names = [f"site-{i:03d}" for i in range(300)]
    spool.begin(names)
    update = random_update(model, 1, "site-a")
    kept = []
    for name in names:
        record = ClientRecord(
            client=name,
            num_examples=1,
            weight=1.0,
            loss=1.0,
            counted=1.0,
            norm=None,
            staleness=0,
            since=None,
            downloaded_bytes=0,
            uploaded_bytes=0,
            seconds=0.0,
        )
        kept.append(spool.add(HeldUpdate.of(update, form).tensors, record, landed=True))
    assert len({id(x.file.places) for x in kept}) == 1
    found = Spool(tmp_path / "spool", 1, form).find()
    assert list(found.updates) == names
    assert len({id(x.file.tensors) for x in found.updates.values()}) == 1
    for name, pair in update_factors(update, state).items():
        read = found.updates["site-123"].factors(name)
        assert torch.equal(read.A, pair.A)
        assert torch.equal(read.B, pair.B)


def update_factors(update, state):
    return {name: update.factors(name, pair) for name, pair in state.adapter.items()}


def silent(round_, client, held):
    return []


FOUR = ("site-a", "site-b", "site-c", "site-d")


def stopped(model, folder, rule):
    """A round of two of four clients, of whom one does not answer; the two that were drawn."""
    parts, state = federation(model, "fedex", silent, participation=rule, spool=folder, seed=3)
    parts.transport.clients = FOUR
    with pytest.raises(NoUpdatesError):
        run_round(parts, state)
    return asked_of(parts)


def test_another_client_takes_the_place_of_one_that_is_shut_out(tmp_path):
    model, rule = AdaptedModel(adapted(CASE)), Participation(clients_per_round=2, min_updates=2)
    drawn = stopped(model, tmp_path / "spool", rule)
    shut_out = AccessList(exclude=(drawn[0],))
    changes = {"participation": rule, "spool": tmp_path / "spool", "access": shut_out, "seed": 3}
    parts, state = federation(model, "fedex", **changes)
    parts.transport.clients = tuple(c for c in FOUR if c != drawn[0])
    _, record = run_round(parts, state)
    taken = [c.client for c in record.clients]
    assert len(taken) == 2
    assert drawn[1] in taken
    assert drawn[0] not in taken


def test_another_client_takes_the_place_of_one_that_is_gone_where_the_round_needs_it(tmp_path):
    model, rule = AdaptedModel(adapted(CASE)), Participation(clients_per_round=2, min_updates=2)
    drawn = stopped(model, tmp_path / "spool", rule)
    parts, state = federation(model, "fedex", participation=rule, spool=tmp_path / "spool", seed=3)
    parts.transport.clients = tuple(c for c in FOUR if c != drawn[1])
    _, record = run_round(parts, state)
    assert len(record.clients) == 2
    assert drawn[1] not in [c.client for c in record.clients]


def test_an_update_that_lacks_a_factor_is_no_update_of_the_common_adapter(tmp_path):
    """Only factors that are frozen are those of the version."""
    model = AdaptedModel(adapted(CASE))
    state = interrupted(model, tmp_path / "spool")
    form = CommonForm(state, model.spec, {})
    spool = Spool(tmp_path / "spool", 1, form)
    whole = spool.find().updates["site-a"]
    name = min(model.modules)
    rest = {x: whole.file.read(x) for x in whole.file.tensors if x != f"B/{name}"}
    damaged = spool.add(rest, whole.record, landed=True)
    with pytest.raises(KeyError):
        damaged.factors(name)
    (fault,) = spool.find().faults
    assert f"it lacks ['B/{name}']" in fault
