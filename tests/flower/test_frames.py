"""Messages in pieces: put together as they were, or refused by what is wrong with them."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedexlora.flower import byte_arrays
from fedexlora.flower.byte_arrays import to_array, to_bytes
from fedexlora.flower.frames import Bounds, Frame, from_records, to_records

PARTS = {"update": bytes(range(23)), "own": b"", "whole": b"12345678"}
BOUNDS = Bounds(parts={"update": 23, "own": 5, "whole": 8})


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(byte_arrays, "PIECE", 4)


def test_a_part_goes_in_pieces_of_bounded_size_that_flower_can_read():
    frame = Frame({"round": 1}, PARTS)
    records = to_records(frame)
    arrays = records.array_records["fedexlora.parts"]
    assert list(arrays) == [
        *(f"update/{i}" for i in range(6)),
        "own/0",
        *(f"whole/{i}" for i in range(2)),
    ]
    assert [array.shape[0] for array in arrays.values()] == [4, 4, 4, 4, 4, 3, 0, 4, 4]
    values = [array.numpy() for array in arrays.values()]
    assert b"".join(value.tobytes() for value in values) == b"".join(PARTS.values())
    assert {value.dtype for value in values} == {np.dtype(np.uint8)}
    assert from_records(records) == frame
    assert from_records(records, BOUNDS) == frame


def test_an_array_of_numpys_own_making_is_read_too():
    made = Array(np.arange(9, dtype=np.uint8))
    assert to_array(bytes(range(9))).data == made.data
    assert to_bytes("x", made) == bytes(range(9))


def changed(change: Callable[[dict[str, Array]], dict[str, Array]], **sizes: object) -> RecordDict:
    """The message of ``PARTS`` with other arrays, or other sizes of its parts."""
    records = to_records(Frame({}, PARTS))
    arrays = change(dict(records.array_records["fedexlora.parts"]))
    stated = {name: len(content) for name, content in PARTS.items()} | sizes
    header = ConfigRecord({"json": "{}", "parts": json.dumps(stated)})
    return RecordDict({"fedexlora.header": header, "fedexlora.parts": ArrayRecord(arrays)})


def without(key: str) -> Callable[[dict[str, Array]], dict[str, Array]]:
    return lambda arrays: {name: array for name, array in arrays.items() if name != key}


def swapped(arrays: dict[str, Array]) -> dict[str, Array]:
    order = ["update/1", "update/0", *list(arrays)[2:]]
    return {name: arrays[name] for name in order}


def same(arrays: dict[str, Array]) -> dict[str, Array]:
    return arrays


@pytest.mark.parametrize(
    ("change", "sizes", "fault"),
    [
        (without("update/5"), {}, "8 arrays, expected 9"),
        (without("update/2"), {}, "8 arrays, expected 9"),
        (without("own/0"), {}, "8 arrays, expected 9"),
        (lambda a: a | {"update/6": to_array(b"x")}, {}, "10 arrays, expected 9"),
        (same, {"own": 10**15}, "'own': 1000000000000000 bytes, expected at most 5"),
        (same, {"own": 5}, "9 arrays, expected 10"),
        (same, {"own": -1}, "expected a whole number"),
        (same, {"own": "1"}, "expected a whole number"),
        (same, {"more": 1}, "1 part(s) that nobody asked for"),
        (swapped, {}, "expected the array 'update/0', found 'update/1'"),
        (lambda a: a | {"update/1": to_array(b"123")}, {}, "'update/1': 3 bytes, expected 4"),
        (lambda a: a | {"own/0": to_array(b"12345")}, {}, "'own/0': 5 bytes, expected 0"),
        (lambda a: a | {"update/1": to_array(b"x" * 5000)}, {}, "'update/1': 5128 bytes"),
        (
            lambda a: a | {"whole/1": Array(np.zeros(4))},
            {},
            "'whole/1': expected an array",
        ),
    ],
)
def test_pieces_that_are_not_those_of_a_part_are_refused(change, sizes, fault):
    with pytest.raises(ValueError, match="not a message of fedexlora") as caught:
        from_records(changed(change, **sizes), BOUNDS)
    assert fault in str(caught.value)


def test_a_claim_of_many_pieces_is_refused_without_making_their_names():
    with pytest.raises(ValueError, match="9 arrays, expected 2251799813685256"):
        from_records(changed(same, own=2**53))


def test_what_names_the_parts_is_bounded_as_the_header_is():
    with pytest.raises(ValueError, match=r"a header of \d+ characters, at most 4096"):
        from_records(changed(same, **{"x" * 5000: 1}), BOUNDS)


def test_a_message_is_held_once_more_while_it_is_made_and_once_more_while_it_is_read(monkeypatch):
    size, piece = 2**22, 2**18
    monkeypatch.setattr(byte_arrays, "PIECE", piece)
    frame = Frame({}, {"update": b"x" * size})
    tracemalloc.start()
    records = to_records(frame)
    made, most = tracemalloc.get_traced_memory()
    assert most <= size + 1.5 * piece
    tracemalloc.reset_peak()
    assert from_records(records).parts == frame.parts
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most - made <= size + piece
