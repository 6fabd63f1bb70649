"""Nodes that send what no node of ours sends: each is named, none stops the server."""

from __future__ import annotations

import io
import json
import weakref
from itertools import pairwise

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict

from fedexlora.errors import RunError
from fedexlora.exchange.delivery import Announcement, Delivery
from fedexlora.flower import membership
from fedexlora.flower import transport as module
from fedexlora.flower.frames import Frame, to_records
from fedexlora.flower.transport import FlowerTransport
from tests.flower.nodes import FakeGrid

DELIVERY = Delivery(None, Announcement("0" * 64, None), b"version")
HELLO = Frame({"client": "north", "rows": 4})


def records(header: str, array: Array | None = None) -> RecordDict:
    """A message whose one part has as many bytes as its array says, of which there are few."""
    arrays = ArrayRecord({} if array is None else {"update/0": array})
    sizes = {} if array is None else {"update": array.shape[0]}
    config = ConfigRecord({"json": header, "parts": json.dumps(sizes)})
    return RecordDict({"fedexlora.header": config, "fedexlora.parts": arrays})


def archive() -> bytes:
    made = io.BytesIO()
    np.savez(made, update=np.zeros(3, np.uint8))
    return made.getvalue()


def claims(count: int) -> bytes:
    """An array whose header says more than there is."""
    made = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(made, header)
    return made.getvalue()


def pickled() -> bytes:
    made = io.BytesIO()
    np.save(made, np.array([{}], dtype=object))
    return made.getvalue()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)


def greeted(answer: Frame | RecordDict) -> FlowerTransport:
    made = FlowerTransport(FakeGrid({7: lambda _: answer}), {}, "base", largest_update=1000)
    made.gather(1, 0.05)
    return made


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ('{"client": "../../etc/passwd", "rows": 1}', "expected a client's name"),
        ('{"client": "north\\n", "rows": 1}', "expected a client's name"),
        ('{"client": ["north"], "rows": 1}', "expected a client's name"),
        ('{"rows": 1}', "expected a client's name, found None"),
        ('{"client": "north", "rows": Infinity}', "header 'rows': expected a whole number"),
        ('{"client": "north", "rows": -1}', "header 'rows': expected a whole number, found -1"),
        ('{"client": "north", "rows": 1e300}', "header 'rows': expected a whole number"),
        ('{"client": "north"}', "header 'rows': expected a whole number, found None"),
        ("[" * 4000, "nested too deeply"),
        ("[" * 100_000, "a header of 100000 characters, at most 4096"),
        ("7", "expected a JSON object"),
        ('{"failure": "\\u001b[2J' + "x" * 900 + '"}', "a reason that is none of the agreed codes"),
        ('{"failure": "out-of-memory"}', "it ran out of memory"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_a_greeting_that_is_none_is_named(header, fault):
    with pytest.raises(RunError, match="0 of 1 nodes were ready") as caught:
        greeted(records(header))
    assert fault in str(caught.value)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (RecordDict(), "not a message of fedexlora"),
        (records("{}"), "its reply has no update"),
        (records("{}", Array("uint8", (1,), "numpy.ndarray", b"junk")), "cannot be read"),
        (records("{}", Array("uint8", (1,), "numpy.ndarray", b"")), "cannot be read"),
        (records("{}", Array("uint8", (1,), "torch", b"junk")), "cannot be read"),
        (
            records("{}", Array("uint8", (1,), "numpy.ndarray", pickled())),
            "expected an array of bytes",
        ),
        (records("{}", Array("uint8", (1,), "numpy.ndarray", claims(10**15))), "cannot be read"),
        (records("{}", Array("uint8", (1,), "numpy.ndarray", archive())), "cannot be read"),
        (records("{}", Array(np.zeros(3))), "expected an array of bytes"),
        (records('{"seconds": NaN}', Array(np.zeros(3, np.uint8))), "expected seconds, found nan"),
        (records('{"seconds": true}', Array(np.zeros(3, np.uint8))), "expected seconds"),
        (records('{"seconds": ' + "9" * 400 + "}", Array(np.zeros(3, np.uint8))), "seconds"),
        (Frame({"seconds": -1}, {"update": b"x"}), "expected seconds, found -1"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_an_answer_that_is_none_is_a_failure_of_its_client(answer, fault):
    node = greeted(HELLO)
    node._grid.nodes[7] = lambda _: answer
    node.ask(1, "north", DELIVERY)
    (reply,) = node.replies(1, 5.0, lambda *_: None)
    assert (reply.client, reply.message, reply.landed) == ("north", None, False)
    assert fault in reply.failure


@pytest.mark.usefixtures("quick")
def test_a_request_that_nobody_answers_is_lost_and_the_others_are_handed_on(monkeypatch):
    """Without a deadline the round would wait for it for ever."""
    silent = {"north": True, "south": False}

    def node(name):
        def answer(frame):
            if frame.header["kind"] == "hello":
                return Frame({"client": name, "rows": 4})
            return None if silent[name] else Frame({"seconds": 1.0}, {"update": b"x"})

        return answer

    grid = FakeGrid({7: node("north"), 8: node("south")})
    made = FlowerTransport(grid, {}, "base", largest_update=1000)
    made.gather(2, 5.0)
    monkeypatch.setattr(module, "_TTL_SECONDS", 0.02)
    for client in ("north", "south"):
        made.ask(1, client, DELIVERY)
    good, lost = made.replies(1, None, lambda *_: None)
    assert (lost.client, lost.failure) == ("north", "lost: no answer within 0.02 s")
    assert (good.client, good.message) == ("south", b"x")
    assert made.waiting == {}


@pytest.mark.usefixtures("quick")
def test_a_node_whose_greeting_failed_is_greeted_again_more_and_more_rarely(monkeypatch):
    """Every greeting starts a process there: a node that is slow must not get ever more of them."""
    monkeypatch.setattr(membership, "_FIRST_PAUSE", 0.1)
    answers = [Error(5, "no answer in time")] * 3 + [HELLO]
    greeted = []

    def slow(_):
        greeted.append(module.time.monotonic())
        return answers[len(greeted) - 1]

    made = FlowerTransport(FakeGrid({7: slow}), {}, "base", largest_update=1000)
    with pytest.raises(RunError, match="it could not be greeted: node unavailable"):
        made.gather(1, 0.05)
    made.gather(1, 10.0)
    assert len(greeted) == 4
    pauses = [after - before for before, after in pairwise(greeted)]
    assert pauses[0] >= 0.05
    assert pauses[1] >= 0.1
    assert pauses[2] >= 0.2


@pytest.mark.usefixtures("quick")
def test_a_node_that_is_known_by_another_id_takes_its_place_once_the_old_one_is_gone(monkeypatch):
    monkeypatch.setattr(membership, "_FIRST_PAUSE", 0.05)
    grid = FakeGrid({7: lambda _: HELLO})
    made = FlowerTransport(grid, {}, "base", largest_update=1000)
    made.gather(1, 5.0)
    grid.nodes[8] = lambda frame: (
        HELLO if frame.header["kind"] == "hello" else Frame({"seconds": 1.0}, {"update": b"8"})
    )
    with pytest.raises(RunError, match="node 8: node 7 is client 'north' already"):
        made.gather(2, 0.05)
    del grid.nodes[7]
    made._look()
    assert made.clients == []
    made.gather(1, 5.0)
    made.ask(1, "north", DELIVERY)
    (reply,) = made.replies(1, 5.0, lambda *_: None)
    assert reply.message == b"8"


@pytest.mark.usefixtures("quick")
def test_what_flower_made_of_an_answer_is_gone_when_the_answer_is_handed_on():
    """The largest message is held once, and not beside the next one."""
    pulled, alive = [], []

    def node(name):
        def answer(frame):
            if frame.header["kind"] == "hello":
                return Frame({"client": name, "rows": 4})
            made = to_records(Frame({"seconds": 1.0}, {"update": name.encode()}))
            alive.append(weakref.ref(made))
            return made

        return answer

    grid = FakeGrid({7: node("north"), 8: node("south")})
    made = FlowerTransport(grid, {}, "base", largest_update=1000)
    made.gather(2, 5.0)
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: pulled.append(ids) or pull(ids)
    for client in ("north", "south"):
        made.ask(1, client, DELIVERY)
    for i, reply in enumerate(made.replies(1, 5.0, lambda *_: None)):
        assert reply.message in {b"north", b"south"}
        assert [ref() is None for ref in alive] == [True, i == 1]
    assert max(map(len, pulled)) == 1
