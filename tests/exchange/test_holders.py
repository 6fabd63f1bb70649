"""Holders that add steps up in different ways stay at one version: ids agree, sums nearly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, stack
from fedexlora.exchange.delivery import deliver
from fedexlora.exchange.history import History, Holdings
from fedexlora.exchange.state import GlobalState
from tests.exchange.versions import FIRST, step_from, taken

ROUNDS, SHAPE = 20, {"up": (72, 40), "down": (40, 72)}


def start() -> GlobalState:
    adapter = {
        name: Factors(torch.randn(4, columns), torch.zeros(rows, 4))
        for name, (rows, columns) in SHAPE.items()
    }
    total = {name: LowRank.zeros(*shape, torch.float64) for name, shape in SHAPE.items()}
    return GlobalState(0, FIRST, adapter, total, {"head": torch.randn(3, 4)})


def played(state: GlobalState, generator: torch.Generator):
    """A round of three clients: its remainder has rank 8."""
    adapter, pieces = {}, {}
    for name, (rows, columns) in SHAPE.items():
        parts = [
            Factors(
                0.3 * torch.randn(rank, columns, generator=generator),
                0.3 * torch.randn(rows, rank, generator=generator),
            )
            for rank in (4, 8)
        ]
        adapter[name], pieces[name] = parts[0], LowRank(parts[1])
    step = step_from(state, adapter, ("A", "B"), pieces, {"head": torch.randn(3, 4)}, {})
    return step, state.advance([step])


def plain(held: GlobalState) -> GlobalState:
    return held


def perturbed(held: GlobalState) -> GlobalState:
    """Another processor's rounding, and far more."""
    total = {}
    for name, matrix in held.total.items():
        noise = 1e-12 * torch.randn(matrix.shape, dtype=torch.float64)
        if isinstance(matrix.value, Factors):
            a, b = matrix.value.A, matrix.value.B
            total[name] = LowRank(Factors(a * (1 + 1e-12), b))
        else:
            total[name] = LowRank(matrix.value * (1 + noise))
    return replace(held, total=total)


def dense(held: GlobalState) -> GlobalState:
    """A holder that multiplies everything out at once."""
    return replace(held, total={name: LowRank(x.dense()) for name, x in held.total.items()})


def reordered(held: GlobalState) -> GlobalState:
    """Columns in another order: another order of all sums, and of compaction."""
    total = {
        name: LowRank(stack([Factors(x.value.A.flip(0), x.value.B.flip(1))]))
        if isinstance(x.value, Factors)
        else x
        for name, x in held.total.items()
    }
    return replace(held, total=total)


def in_threads(held: GlobalState) -> GlobalState:
    torch.set_num_threads(2)
    return held


@pytest.mark.exactness
@pytest.mark.parametrize("way", [perturbed, dense, reordered, in_threads], ids=lambda w: w.__name__)
def test_twenty_rounds_of_two_holders_who_add_up_in_different_ways(way):
    """One skips rounds; neither takes a snapshot after its first."""
    torch.manual_seed(0)
    generator, threads = torch.Generator().manual_seed(1), torch.get_num_threads()
    server = start()
    holdings, held, snapshots = Holdings({}, History(4)), {}, 0
    ways = {"a": plain, "b": way}
    for round_ in range(1, ROUNDS + 1):
        asked = ["a", "b"] if round_ % 3 == 1 or round_ == ROUNDS else ["a"]
        for client in asked:
            since = holdings.versions.get(client)
            delivery = deliver(holdings.history, server, since)
            snapshots += delivery.announced.snapshot is not None
            try:
                torch.set_num_threads(threads)
                reached = ways[client](held[client]) if client in held else None
                held[client] = taken(reached, delivery)
            finally:
                torch.set_num_threads(threads)
            assert held[client].id == server.id
        step, reached = played(server, generator)
        holdings.history.store.keep(step, reached)
        holdings = holdings.after(step, holdings.changes(server.version, asked, []))
        server = reached
    assert snapshots == 2
    one, other = held["a"], held["b"]
    assert one.version == other.version == ROUNDS - 1
    for name in SHAPE:
        sums = [x.total[name].dense() for x in (one, other)]
        assert float((sums[0] - sums[1]).norm() / sums[0].norm()) < 1e-8
        assert isinstance(one.total[name].value, torch.Tensor), "the total has turned dense"
        assert torch.equal(one.adapter[name].B, other.adapter[name].B)
    assert torch.equal(one.dense["head"], other.dense["head"])
