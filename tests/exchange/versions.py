"""Versions and steps of random numbers, for tests of what leads from one to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.delivery import Delivery, receive
from fedexlora.exchange.history import History
from fedexlora.exchange.state import GlobalState, state_tensors
from fedexlora.exchange.step import Step
from fedexlora.exchange.step_writer import StepBuilder, StepSink
from fedexlora.exchange.version import Adapter

FIRST = "f" * 64
"""The id of versions that tests begin with."""
Held = Mapping[str, int | None]
Round = tuple[Step, GlobalState]
"""A step and where it leads."""


def state(version: int = 2) -> GlobalState:
    """A version of one small module and a head, with a remainder."""
    generator = torch.Generator().manual_seed(version)
    a, b = torch.randn(2, 5, generator=generator), torch.randn(7, 2, generator=generator)
    total = {"layer.q": LowRank(Factors(torch.randn(1, 5), torch.randn(7, 1)).to(torch.float64))}
    heads = {"head.weight": torch.randn(3, 4)}
    return GlobalState(version, FIRST, {"layer.q": Factors(a, b)}, total, heads)


def same(x: GlobalState, y: GlobalState) -> bool:
    """Whether two states are equal, bit for bit."""
    one, other = state_tensors(x), state_tensors(y)
    equal = all(torch.equal(one[k], other[k]) for k in one | other)
    return (x.version, x.id) == (y.version, y.id) and equal


def step_from(
    held: GlobalState,
    adapter: Adapter,
    trained: Sequence[str],
    pieces: Mapping[str, LowRank],
    dense: Mapping[str, torch.Tensor],
    own: Mapping[str, Adapter],
) -> Step:
    """The step from a version to one of this adapter, heads and own adapters."""
    sink = StepBuilder(held.version + 1, held.id, trained)
    for name, pair in adapter.items():
        sink.add(name, pair, pieces.get(name, LowRank.zeros(*pair.shape, pair.dtype)))
    return sink.finish(dense, *held.changed(own), {})


def step(held: GlobalState, trained: tuple[str, ...] = ("A", "B")) -> Round:
    """One round, in which client ``b`` gets an adapter of its own."""
    pieces = {"layer.q": LowRank(Factors(torch.randn(1, 5), torch.randn(7, 1)))}
    a = torch.randn(2, 5) if "A" in trained else held.adapter["layer.q"].A
    adapter = {"layer.q": Factors(a, torch.randn(7, 2))}
    own = {"b": {"layer.q": Factors(torch.randn(3, 5), torch.randn(7, 3))}}
    made = step_from(held, adapter, trained, pieces, held.dense, own)
    return made, held.advance([made])


def steps(count: int, held: GlobalState) -> list[Round]:
    """Rounds one after the other."""
    found: list[Round] = []
    for _ in range(count):
        found.append(step(found[-1][1] if found else held))
    return found


def history(*rounds: Round, window: int = 4) -> History:
    """What the server keeps of rounds."""
    found = History(window)
    for made, reached in rounds:
        found = after(found, made, reached)
    return found


def after(known: History, made: Step, reached: GlobalState) -> History:
    """A history in memory, and one more step."""
    known.store.keep(made, reached)
    return known.after(made)


def stored(
    sink: StepSink, made: Step, reached: GlobalState, held: Mapping[str, int | None]
) -> Step:
    """Write a step that was made in memory."""
    for name, pair in reached.adapter.items():
        zero = LowRank.zeros(*pair.shape, torch.float32)
        sink.add(name, pair, made.pieces.get(name, zero))
    own = {client: reached.own[client] for client in (*made.own, *made.shared)}
    return sink.finish(made.dense, own, reached.own_digests, held)


def wide_state() -> GlobalState:
    """A total that is far larger than a round's piece."""
    shape = torch.randn(20, 64), torch.randn(48, 20)
    adapter = {"layer.q": Factors(torch.randn(2, 64), torch.randn(48, 2))}
    total = {"layer.q": LowRank(Factors(*shape).to(torch.float64))}
    return GlobalState(0, FIRST, adapter, total, {})


def wide_steps(count: int, held: GlobalState) -> list[Round]:
    """Rounds of that."""
    found = []
    for _ in range(count):
        pieces = {"layer.q": LowRank(Factors(torch.randn(2, 64), torch.randn(48, 2)))}
        adapter = {"layer.q": Factors(torch.randn(2, 64), torch.randn(48, 2))}
        made = step_from(held, adapter, ("A", "B"), pieces, {}, {})
        held = held.advance([made])
        found.append((made, held))
    return found


def taken(held: GlobalState | None, delivery: Delivery, client: str = "") -> GlobalState:
    """What a receiver makes of a delivery."""
    own = delivery.to(client).own if client else None
    return receive(held, delivery.announced, delivery.message, own, client)


def last(rounds: Sequence[Round]) -> GlobalState:
    """Where rounds lead."""
    return rounds[-1][1]
