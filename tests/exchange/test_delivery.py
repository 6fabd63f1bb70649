"""Steps and snapshots: whoever has them is at the version, and everything else has a name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, stack
from fedexlora.errors import (
    DigestError,
    GapError,
    HistoryError,
    RunError,
    SnapshotError,
    VersionError,
)
from fedexlora.exchange.delivery import Announcement, deliver, encode_own, with_own
from fedexlora.exchange.digest import group
from fedexlora.exchange.state import state_from, state_tensors
from fedexlora.exchange.wire import pack, unpack
from tests.exchange.versions import (
    FIRST,
    after,
    history,
    last,
    same,
    state,
    step,
    step_from,
    steps,
    taken,
    wide_state,
    wide_steps,
)


def since(delivery) -> int | None:
    return unpack(delivery.message)[1]["since"]


@pytest.mark.parametrize("trained", [("A", "B"), ("B",)])
def test_a_receiver_of_every_step_holds_the_bits_of_the_server(trained):
    server, kept = state(), history()
    client = taken(None, deliver(kept, server, None, bitwise=True))
    assert same(client, server)
    for _ in range(3):  # the total turns dense on the way
        made, reached = step(server, trained)
        kept, before, server = after(kept, made, reached), server.version, reached
        delivery = deliver(kept, server, before)
        assert same(taken(client, delivery, "b"), server)
        client = taken(client, delivery)
        assert same(client, server.common())
    assert isinstance(server.total["layer.q"].value, torch.Tensor)
    assert same(taken(None, deliver(kept, server, None, bitwise=True)), server.common())
    assert encode_own(server, "a") is None
    assert same(state_from(server.version, server.id, state_tensors(server)), server)


def test_a_newcomer_takes_the_compacted_total_in_float32_under_the_same_id():
    wide = wide_state()
    twice = stack([Factors(torch.randn(10, 64), torch.randn(48, 10)).to(torch.float64)] * 2)
    server = last(wide_steps(1, replace(wide, total={"layer.q": LowRank(twice)})))
    delivery = deliver(history(), server, None)
    tensors, _ = unpack(delivery.message)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert tensors["total.A/layer.q"].shape == (12, 64), "rank 10, and 2 of the step"
    client = taken(None, delivery)
    assert (client.id, client.version) == (server.id, 1)
    held, exact = client.total["layer.q"], server.total["layer.q"].dense()
    assert held.value.dtype == torch.float64
    assert float((held.dense() - exact).norm() / exact.norm()) < 2e-7
    made = wide_steps(1, server)
    further = taken(client, deliver(history(*made), last(made), 1))
    assert further.id == last(made).id


@pytest.mark.parametrize("missed", [1, 2, 3])
def test_a_receiver_that_missed_rounds_lands_on_the_same_bits(missed):
    wide = wide_state()
    made = wide_steps(3, wide)
    server, held = last(made), [wide, *(reached for _, reached in made)][-1 - missed]
    delivery = deliver(history(*made), server, held.version)
    tensors, header = unpack(delivery.message)
    assert header["since"] == held.version
    assert same(taken(held, delivery), server)
    assert sum(name.startswith("A/") for name in tensors) == 1, "the adapter of now alone"
    assert len(header["steps"]) == missed
    assert len(delivery.message) < len(deliver(history(), server, None).message)


def test_halves_that_change_in_turn_both_reach_whoever_missed_rounds():
    held = state()
    rounds: list = []
    for letters in (("B",), ("A",), ("B",), ("A",)):
        rounds.append(step(rounds[-1][1] if rounds else held, letters))
    known, end = history(*rounds), last(rounds)
    for at in range(4):
        start = held if at == 0 else rounds[at - 1][1]
        delivery = deliver(known, end, start.version)
        assert same(taken(start.common(), delivery), end.common())
        tensors, _ = unpack(delivery.message)
        sent = sorted(name for name in tensors if "A/" in name or "B/" in name)
        sent = [name for name in sent if not name.startswith("piece")]
        earlier = ["step5/B/layer.q"] if at < 3 else []
        assert sent == ["A/layer.q", *earlier]


def test_a_step_that_changes_no_heads_leaves_them_as_they_are():
    held = state()
    first, reached = step(held)
    quiet = step_from(reached, reached.adapter, ("A", "B"), {}, {}, {})
    end = reached.advance([quiet])
    assert torch.equal(end.dense["head.weight"], held.dense["head.weight"])
    delivery = deliver(history((first, reached), (quiet, end)), end, held.version)
    assert same(taken(held.common(), delivery), end.common())


def test_what_is_older_than_the_window_gets_a_snapshot():
    made = wide_steps(5, wide_state())
    kept, server = history(*made, window=3), last(made)
    assert sorted(kept.ids) == [2, 3, 4, 5]
    assert since(deliver(kept, server, 2)) == 2
    assert since(deliver(kept, server, 1)) is None


def test_steps_are_sent_also_where_a_snapshot_is_smaller():
    """Whoever sums in another way never loses its place by it."""
    made = steps(4, state())
    delivery = deliver(history(*made), last(made), 2)
    assert since(delivery) == 2
    assert len(delivery.message) > len(deliver(history(), last(made), None).message)


def test_a_frozen_factor_travels_once():
    held, sizes = state(), []
    for trained in (("A", "B"), ("B",)):
        made = step(held, trained)
        names = unpack(deliver(history(made), made[1], 2).message)[0]
        sizes.append(sum(name.startswith("A/") for name in names))
    assert sizes == [1, 0]


def test_a_step_is_never_applied_twice_or_over_a_gap():
    start = wide_state()
    first, second = wide_steps(2, start)
    one, two = deliver(history(first), first[1], 0), deliver(history(first, second), second[1], 1)
    reached = taken(start, one)
    assert taken(reached, one) is reached, "held already"
    end = taken(reached, two)
    with pytest.raises(GapError, match="from version 0 to 1, but the receiver holds version 2"):
        taken(end, one)
    with pytest.raises(GapError, match="from version 1 to 2, but the receiver holds version 0"):
        taken(start, two)
    with pytest.raises(GapError, match="holds nothing"):
        taken(None, one)


def test_a_receiver_that_is_further_than_the_server_knows_adds_only_what_it_lacks():
    start = wide_state()
    made = wide_steps(3, start)
    delivery = deliver(history(*made), last(made), 0)
    assert since(delivery) == 0
    for further in (start, *(reached for _, reached in made)):
        assert same(taken(further, delivery), last(made))


def test_a_receiver_of_another_history_is_found_out_at_whatever_version():
    start = wide_state()
    made = wide_steps(3, start)
    delivery = deliver(history(*made), last(made), 0)
    for held in (start, *(reached for _, reached in made)):
        with pytest.raises(HistoryError, match=f"version {held.version} of the receiver is not"):
            taken(replace(held, id="0" * 64), delivery)


def test_a_step_of_another_model_is_refused():
    made, _ = step(state())
    with pytest.raises(VersionError, match="another model: the piece of layer.q is"):
        replace(state(), total={}).advance([made])
    with pytest.raises(VersionError, match=r"another model: heads: expected {}"):
        replace(state(), dense={}).advance([made])


@pytest.mark.parametrize("held", [state(), None])
@pytest.mark.parametrize("cut", [0, 3, -3])
def test_a_damaged_message_of_the_server_is_refused(held, cut):
    delivery = deliver(history(), state(), None)
    with pytest.raises(RunError, match="damaged"):
        taken(held, replace(delivery, message=delivery.message[:cut]))


def spoilt(delivery, name: str):
    """The message with one bit of a tensor changed, signed anew."""
    tensors, header = unpack(delivery.message)
    tensors[name] = tensors[name].clone()
    tensors[name].reshape(-1)[0] *= 1.0 + 2.0**-20
    return replace(delivery, message=pack(tensors, header))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("piece3.A/layer.q", "step 3 .*remainder: expected"),
        ("piece4.B/layer.q", "step 4 .*remainder: expected"),
        ("A/layer.q", "step 4 .*adapter: expected"),
        ("dense/head.weight", "step 4 .*heads: expected"),
    ],
)
def test_a_step_with_another_digest_is_refused_and_its_part_is_named(name, part):
    made = steps(2, state())
    with pytest.raises(DigestError, match=f"(?s){part}"):
        taken(state(), spoilt(deliver(history(*made), last(made), 2), name))


@pytest.mark.parametrize("part", range(4))
def test_a_digest_of_what_is_not_sent_cannot_be_changed(part):
    made = steps(2, state())
    delivery = deliver(history(*made), last(made), 2)
    tensors, header = unpack(delivery.message)
    header["steps"][0][part] = "0" * 64
    with pytest.raises(DigestError, match="do not lead to the version that was announced|step 3"):
        taken(state(), replace(delivery, message=pack(tensors, header)))


@pytest.mark.parametrize("name", ["A/layer.q", "dense/head.weight", "total.B/layer.q"])
def test_a_snapshot_that_is_not_the_announced_one_is_refused(name):
    server = last(steps(1, replace(state(), total={"layer.q": LowRank.zeros(7, 5, torch.float64)})))
    delivery = deliver(history(), server, None)
    with pytest.raises(SnapshotError, match="version 3 is not the one that was announced"):
        taken(None, spoilt(delivery, name))
    with pytest.raises(SnapshotError, match="not the one that was announced"):
        taken(None, replace(delivery, announced=Announcement(server.id, "0" * 64)))


def test_a_message_that_leads_elsewhere_than_announced_is_refused():
    made = steps(1, state())
    for held in (2, None):
        delivery = deliver(history(*made), last(made), held)
        other = Announcement(FIRST, delivery.announced.snapshot)
        with pytest.raises(DigestError, match="leads to another version"):
            taken(state(), replace(delivery, announced=other))
    steps_, whole = (deliver(history(*made), last(made), held) for held in (2, None))
    for one, two in ((steps_, whole), (whole, steps_)):
        with pytest.raises(VersionError, match="the other way round"):
            taken(state(), replace(one, announced=two.announced))


def test_an_adapter_of_another_client_or_version_is_refused():
    made, first = step(state(2))
    message, digest = encode_own(first, "b"), made.digests.own
    assert with_own(first.common(), message, "b", digest).own.keys() == {"b"}
    with pytest.raises(VersionError, match="damaged.*expected the adapter of 'c' in version 3"):
        with_own(first.common(), message, "c", digest)
    with pytest.raises(VersionError, match="damaged.*expected the adapter of 'b' in version 4"):
        with_own(step(first)[1].common(), message, "b", digest)
    tensors, header = unpack(message)
    tensors["A/layer.q"] += 1.0
    with pytest.raises(DigestError, match="the adapter of b in version 3 has not its digest"):
        with_own(first.common(), pack(tensors, header), "b", digest)


def test_an_adapter_of_ones_own_is_one_of_many():
    """Each client checks its own with a few digests of the others'."""
    held = state()
    own = {
        f"client-{i}": {"layer.q": Factors(torch.randn(3, 5), torch.randn(7, 3))} for i in range(9)
    }
    made = step_from(held, held.adapter, ("A", "B"), {}, held.dense, own)
    server = held.advance([made])
    assert made.digests.own == group(server.own_digests)
    delivery = deliver(history((made, server)), server, 2)
    for client in own:
        found = taken(held, delivery, client)
        assert same(found, replace(server, own={client: own[client]}))
        assert len(unpack(encode_own(server, client))[1]["branch"]) <= 4


def test_an_own_adapter_that_did_not_change_is_no_part_of_the_step_but_of_its_digest():
    _, first = step(state())
    fresh = {"layer.q": Factors(torch.randn(3, 5), torch.randn(7, 3))}
    made = step_from(first, first.adapter, ("A", "B"), {}, first.dense, {**first.own, "a": fresh})
    assert made.own.keys() == {"a"}
    reached = first.advance([made])
    assert reached.own.keys() == {"a", "b"}
    assert group(reached.own_digests) == made.digests.own
    assert replace(reached).own_digests == reached.own_digests, "those of the tensors"
