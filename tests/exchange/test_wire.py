"""Messages and updates: decode after encode is the identity, bitwise, and damage has a name."""

from __future__ import annotations

import pytest
import torch

from fedexlora.errors import UpdateError
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec, TensorSpec
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
    fields = {"client": "a", "round": 3, "version": "v2", "num_examples": 9, "loss": 0.5}
    fields["base"] = "the base"
    return ClientUpdate(**({**fields, "tensors": tensors} | changes))


def check(changed: ClientUpdate) -> None:
    check_update(changed, SPEC, client="a", round_=3, version="v2", base="the base")


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
    assert (found.client, found.round, found.version) == ("a", 3, "v2")
    assert (found.num_examples, found.loss) == (9, 0.5)
    assert all(torch.equal(found.tensors[name], sent.tensors[name]) for name in sent.tensors)
    check(found)


@pytest.mark.parametrize("cut", [0, 4, 8, 60, -1])
def test_a_truncated_message_is_an_update_error_that_names_the_client(cut):
    with pytest.raises(UpdateError, match="round 3, client 'a'.*\n.*not a safetensors message"):
        decode_update(update().encode()[:cut], SPEC, 3, "a")


def test_a_header_of_other_types_is_refused_with_every_fault():
    message = pack({}, {"client": 4, "round": "3", "version": "v2", "num_examples": 9})
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
        "version": ({"version": "v1"}, "version: expected 'v2', found 'v1'"),
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
