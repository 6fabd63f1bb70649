"""Messages: decode after encode is the identity, bitwise, and damage has a name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import RunError, UpdateError
from fedexlora.exchange.shipment import History, Step, encode_own, receive, receive_own
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec, TensorSpec
from fedexlora.exchange.state import GlobalState, state_from, state_tensors
from fedexlora.exchange.update import ClientUpdate, check_update, decode_update
from fedexlora.exchange.wire import pack, unpack

SPEC = AdapterSpec(
    {"layer.q": ModuleSpec(7, 5, 2, torch.float32, 2.0)},
    {"head.weight": TensorSpec((3, 4), torch.float32)},
    ("A", "B"),
)


def update(**changes: object) -> ClientUpdate:
    tensors = {
        "A/layer.q": torch.randn(2, 5),
        "B/layer.q": torch.randn(7, 2),
        "dense/head.weight": torch.randn(3, 4),
    }
    fields = {"client": "a", "round": 3, "version": 2, "num_examples": 9, "loss": 0.5}
    fields["base"] = "the base"
    return ClientUpdate(**({**fields, "tensors": tensors} | changes))


def check(changed: ClientUpdate) -> None:
    check_update(changed, SPEC, client="a", round_=3, version=2, base="the base")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]
)
def test_tensors_survive_bit_for_bit(dtype):
    tensors = {"x": torch.randn(3, 5).to(dtype), "empty": torch.zeros(0, 4).to(dtype)}
    tensors["strided"] = tensors["x"].T
    found, header = unpack(pack(tensors, {"a": [1, None, "ä"]}))
    assert header == {"a": [1, None, "ä"]}
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_special_values_survive_bit_for_bit():
    x = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    found, _ = unpack(pack({"x": x}, {}))
    assert torch.equal(found["x"].view(torch.int32), x.view(torch.int32))


def test_an_update_survives():
    sent = update()
    found = decode_update(sent.encode(), SPEC, 3, "a")
    assert (found.client, found.round, found.version) == ("a", 3, 2)
    assert (found.num_examples, found.loss) == (9, 0.5)
    assert all(torch.equal(found.tensors[name], sent.tensors[name]) for name in sent.tensors)
    check(found)


@pytest.mark.parametrize("cut", [0, 4, 8, 60, -1])
def test_a_truncated_message_is_an_update_error_that_names_the_client(cut):
    with pytest.raises(UpdateError, match="round 3, client 'a'.*\n.*not a safetensors message"):
        decode_update(update().encode()[:cut], SPEC, 3, "a")


def test_a_header_of_other_types_is_refused_with_every_fault():
    message = pack({}, {"client": 4, "round": "3", "version": 2, "num_examples": 9})
    with pytest.raises(UpdateError) as caught:
        decode_update(message, SPEC, 3, "a")
    assert caught.value.faults == (
        "header 'client': expected str, found 4",
        "header 'round': expected int, found '3'",
        "header 'loss': expected float, found None",
        "header 'base': expected str, found None",
    )


def corrupted() -> dict[str, tuple[dict, str]]:
    good = dict(update().tensors)
    nan = good["B/layer.q"].clone()
    nan[2, 1] = float("nan")
    return {
        "missing": ({"tensors": {k: v for k, v in good.items() if k[0] != "B"}}, "B/layer.q: miss"),
        "unexpected": ({"tensors": good | {"A/other": torch.ones(1)}}, "A/other: unexpected"),
        "transposed": (
            {"tensors": good | {"B/layer.q": good["B/layer.q"].T}},
            r"B/layer.q: expected float32 \[7, 2\], found float32 \[2, 7\]",
        ),
        "dtype": (
            {"tensors": good | {"A/layer.q": good["A/layer.q"].half()}},
            r"A/layer.q: expected float32 \[2, 5\], found float16",
        ),
        "nan": ({"tensors": good | {"B/layer.q": nan}}, "B/layer.q: 1 of 14 values are not finite"),
        "round": ({"round": 2}, "round: expected 3, found 2"),
        "version": ({"version": 1}, "version: expected 2, found 1"),
        "client": ({"client": "b"}, "client: expected 'a', found 'b'"),
        "base": ({"base": "other"}, "base: expected 'the base', found 'other'"),
        "rank": (
            {"tensors": good | {"A/layer.q": torch.ones(3, 5)}},
            r"A/layer.q: expected float32 \[2, 5\], found float32 \[3, 5\]",
        ),
        "no examples": ({"num_examples": 0}, "num_examples: expected at least 1, found 0"),
        "negative": ({"num_examples": -4}, "num_examples: expected at least 1, found -4"),
        "loss": ({"loss": float("nan")}, "loss: expected a finite number, found nan"),
    }


@pytest.mark.parametrize("kind", corrupted())
def test_each_corruption_is_named(kind):
    changes, message = corrupted()[kind]
    with pytest.raises(UpdateError, match=message) as caught:
        check(update(**changes))
    assert len(caught.value.faults) == 1


def test_all_corruptions_are_named_at_once():
    with pytest.raises(UpdateError) as caught:
        check(update(round=1, num_examples=0, loss=float("inf"), tensors={}))
    assert len(caught.value.faults) == 6


def state(version: int = 2) -> GlobalState:
    generator = torch.Generator().manual_seed(version)
    adapter = {
        "layer.q": Factors(
            torch.randn(2, 5, generator=generator), torch.randn(7, 2, generator=generator)
        )
    }
    total = {"layer.q": LowRank(Factors(torch.randn(1, 5), torch.randn(7, 1)).to(torch.float64))}
    return GlobalState(version, adapter, total, {"head.weight": torch.randn(3, 4)})


def same(x: GlobalState, y: GlobalState) -> bool:
    one, other = state_tensors(x), state_tensors(y)
    return x.version == y.version and all(torch.equal(one[k], other[k]) for k in one | other)


def step(held: GlobalState, trained: tuple[str, ...] = ("A", "B")) -> Step:
    pieces = {"layer.q": LowRank(Factors(torch.randn(1, 5), torch.randn(7, 1)))}
    b = torch.randn(7, 2)
    a = torch.randn(2, 5) if "A" in trained else held.adapter["layer.q"].A
    adapter = {"layer.q": Factors(a, b)}
    own = {"b": {"layer.q": Factors(torch.randn(3, 5), torch.randn(7, 3))}}
    after = held.advance(adapter, pieces, held.dense, own)
    return Step(after, pieces, trained, {"layer.q": 0.0})


def history(*steps: Step, window: int = 4, trained: tuple[str, ...] = ("A", "B")) -> History:
    found = History(window, {}, trained)
    for taken in steps:
        found = found.after(taken)
    return found


@pytest.mark.parametrize("trained", [("A", "B"), ("B",)])
def test_a_receiver_of_the_total_and_of_the_piece_hold_the_same_bits_as_the_server(trained):
    server, kept = state(), history(trained=trained)
    client = receive(None, kept.encode(server, None))
    assert same(client, server)
    for _ in range(3):  # the total turns dense on the way
        taken = step(server, trained)
        server, before, kept = taken.state, server.version, kept.after(taken)
        client = receive(client, kept.encode(server, before))
        assert same(client, server.common())
        assert same(receive_own(client, "b", encode_own(server, "b")), server)
    assert isinstance(server.total["layer.q"].value, torch.Tensor)
    assert same(receive(None, kept.encode(server, None)), server.common())
    assert encode_own(server, "a") is None
    assert same(state_from(server.version, state_tensors(server)), server)


def steps(count: int, held: GlobalState) -> list[Step]:
    found = []
    for _ in range(count):
        found.append(step(held))
        held = found[-1].state
    return found


@pytest.mark.parametrize("missed", [1, 2, 3])
def test_a_receiver_that_missed_rounds_lands_on_the_same_bits(missed):
    wide = wide_state()
    taken = wide_steps(3, wide)
    server = taken[-1].state
    held = [wide, *(x.state for x in taken)][-1 - missed]
    kept = history(*taken)
    message = kept.encode(server, held.version)
    assert unpack(message)[1]["since"] == held.version
    assert same(receive(held, message), server)
    assert len(message) < len(kept.encode(server, None))


def wide_state() -> GlobalState:
    """A total that is far larger than a round's piece."""
    shape = torch.randn(20, 64), torch.randn(48, 20)
    adapter = {"layer.q": Factors(torch.randn(2, 64), torch.randn(48, 2))}
    total = {"layer.q": LowRank(Factors(*shape).to(torch.float64))}
    return GlobalState(0, adapter, total, {})


def wide_steps(count: int, held: GlobalState) -> list[Step]:
    found = []
    for _ in range(count):
        pieces = {"layer.q": LowRank(Factors(torch.randn(2, 64), torch.randn(48, 2)))}
        adapter = {"layer.q": Factors(torch.randn(2, 64), torch.randn(48, 2))}
        held = held.advance(adapter, pieces, {}, {})
        found.append(Step(held, pieces, ("A", "B"), {"layer.q": 0.0}))
    return found


def test_what_is_older_than_the_window_gets_the_total():
    taken = wide_steps(5, wide_state())
    kept = history(*taken, window=3)
    assert sorted(kept.pieces) == [3, 4, 5]
    server = taken[-1].state
    assert unpack(kept.encode(server, 2))[1]["since"] == 2
    assert unpack(kept.encode(server, 1))[1]["since"] is None


def test_the_total_is_sent_where_it_is_smaller():
    taken = steps(4, state())
    kept, server = history(*taken), taken[-1].state
    pieces_of_four = kept.encode(server, 2)
    assert len(pieces_of_four) <= len(kept.encode(server, None))


def test_a_frozen_factor_travels_once():
    held = state()
    sizes = []
    for trained in (("A", "B"), ("B",)):
        taken = step(held, trained)
        kept = history(taken, trained=trained)
        names = unpack(kept.encode(taken.state, 2))[0]
        sizes.append(sum(name.startswith("A/") for name in names))
    assert sizes == [1, 0]


def test_a_piece_is_never_applied_twice_or_over_a_gap():
    start = wide_state()
    first, second = wide_steps(2, start)
    one = history(first).encode(first.state, 0)
    two = history(first, second).encode(second.state, 1)
    reached = receive(start, one)
    again = receive(reached, one)
    assert again.fingerprint() == first.state.fingerprint()
    last = receive(reached, two)
    with pytest.raises(RunError, match="from version 0 to 1, but the receiver holds version 2"):
        receive(last, one)
    with pytest.raises(RunError, match="from version 1 to 2, but the receiver holds version 0"):
        receive(start, two)
    with pytest.raises(RunError, match="holds nothing"):
        receive(None, one)


def test_a_receiver_that_is_further_than_the_server_knows_adds_only_what_it_lacks():
    start = wide_state()
    taken = wide_steps(3, start)
    kept, server = history(*taken), taken[-1].state
    message = kept.encode(server, 0)
    assert unpack(message)[1]["since"] == 0
    for further in (start, taken[0].state, taken[1].state, server):
        assert receive(further, message).fingerprint() == server.fingerprint()


def test_a_receiver_whose_version_is_another_model_is_found_out():
    start = wide_state()
    (taken,) = wide_steps(1, start)
    other = replace(start, total={"layer.q": start.total["layer.q"].scaled(1.0 + 2.0**-50)})
    with pytest.raises(RunError, match="came out as another model than the server's"):
        receive(other, history(taken).encode(taken.state, 0))


@pytest.mark.parametrize("message", [b"", b"abc", history().encode(state(), None)[:-3]])
def test_a_damaged_message_of_the_server_is_refused(message):
    with pytest.raises(RunError, match="damaged"):
        receive(state(), message)


def test_an_adapter_of_another_client_or_version_is_refused():
    first = step(state(2)).state
    message = encode_own(first, "b")
    with pytest.raises(RunError, match="damaged.*expected the adapter of 'c' in version 3"):
        receive_own(first.common(), "c", message)
    with pytest.raises(RunError, match="damaged.*expected the adapter of 'b' in version 4"):
        receive_own(step(first).state.common(), "b", message)


@pytest.mark.parametrize("where", ["tensor", "header"])
def test_a_message_that_was_edited_is_refused(where):
    message = pack({"x": torch.ones(4)}, {"version": 4})
    edited = (
        message[:-1] + b"\x40"
        if where == "tensor"
        else message.replace(b'version\\": 4', b'version\\": 5')
    )
    assert edited != message
    assert len(edited) == len(message)
    with pytest.raises(ValueError, match="checksum"):
        unpack(edited)
