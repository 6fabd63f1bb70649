"""Messages: decode after encode is the identity, bitwise, and damage has a name."""

from __future__ import annotations

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import RunError, UpdateError
from fedexlora.exchange.shipment import Step, encode_own, encode_step, encode_total, receive
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
    found = decode_update(sent.encode(), 3, "a")
    assert (found.client, found.round, found.version) == ("a", 3, 2)
    assert (found.num_examples, found.loss) == (9, 0.5)
    assert all(torch.equal(found.tensors[name], sent.tensors[name]) for name in sent.tensors)
    check(found)


@pytest.mark.parametrize("cut", [0, 4, 8, 60, -1])
def test_a_truncated_message_is_an_update_error_that_names_the_client(cut):
    with pytest.raises(UpdateError, match="round 3, client 'a'.*\n.*not a safetensors message"):
        decode_update(update().encode()[:cut], 3, "a")


def test_a_header_of_other_types_is_refused_with_every_fault():
    message = pack({}, {"client": 4, "round": "3", "version": 2, "num_examples": 9})
    with pytest.raises(UpdateError) as caught:
        decode_update(message, 3, "a")
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


@pytest.mark.parametrize("trained", [("A", "B"), ("B",)])
def test_a_receiver_of_the_total_and_of_the_piece_hold_the_same_bits_as_the_server(trained):
    server = state()
    client = receive(None, encode_total(server))
    assert same(client, server)
    for _ in range(3):  # the total turns dense on the way
        taken = step(server, trained)
        server = taken.state
        client = receive(client, encode_step(taken), encode_own(server))
        assert same(client, server)
    assert isinstance(server.total["layer.q"].value, torch.Tensor)
    assert same(receive(None, encode_total(server), encode_own(server)), server)
    assert receive(None, encode_total(server)).own == {}
    assert same(state_from(server.version, state_tensors(server)), server)


def test_a_frozen_factor_travels_once():
    held = state()
    size = len(encode_step(step(held))) - len(encode_step(step(held, ("B",))))
    assert size >= 2 * 5 * 4


def test_a_piece_is_never_applied_twice_or_over_a_gap():
    first = step(state(2))
    second = step(first.state)
    reached = receive(state(2), encode_step(first))
    with pytest.raises(RunError, match="from version 2 to 3, but the receiver holds version 3"):
        receive(reached, encode_step(first))
    with pytest.raises(RunError, match="from version 3 to 4, but the receiver holds version 2"):
        receive(state(2), encode_step(second))
    with pytest.raises(RunError, match="holds nothing"):
        receive(None, encode_step(first))


@pytest.mark.parametrize("message", [b"", b"abc", encode_total(state())[:-3]])
def test_a_damaged_message_of_the_server_is_refused(message):
    with pytest.raises(RunError, match="damaged"):
        receive(state(), message)


def test_an_adapter_of_another_client_or_version_is_refused():
    first = step(state(2)).state
    with pytest.raises(RunError, match="damaged.*expected the adapter of 'c' in version 3"):
        receive(None, encode_total(first), {"c": encode_own(first)["b"]})
    with pytest.raises(RunError, match="damaged.*expected the adapter of 'b' in version 4"):
        receive(None, encode_total(step(first).state), encode_own(first))


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
