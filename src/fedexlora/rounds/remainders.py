"""How large a round's remainders are, and their sum over rounds: found on factors of no meaning.

The round's own reduction is run on one module of each kind, with random factors of the clients'
ranks. These are in general position: what comes out has the largest rank that the method can lead
to. Real ones may lie closer together, and are smaller then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, break_even
from fedexlora.exchange.layout import each_once
from fedexlora.exchange.sizes import rank_of, shape_lowrank
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.step import PIECE
from fedexlora.exchange.update import ClientUpdate
from fedexlora.exchange.version import Adapter
from fedexlora.methods.rule import Rule
from fedexlora.rounds.common_update import CommonForm, HeldUpdate
from fedexlora.rounds.reduction import Reducer, WeightedUpdate, step_in_memory

_SETTLED = 6
"""Rounds after which the memory of a server, as momentum, has come to its largest rank."""
_ID = "0" * 64


@dataclass(frozen=True, slots=True)
class Remainders:
    """The remainders of a run, without numbers, on torch's meta device."""

    pieces: Sequence[Mapping[str, LowRank]]
    """By round from 1: what a step has of each module, float32. No zero pieces."""
    period: int
    """After the last of these rounds, this many of them come again."""
    shapes: Mapping[str, tuple[int, int]]

    def of_round(self, round_: int) -> Mapping[str, LowRank]:
        """The pieces that a round makes."""
        place = round_ - 1
        if place >= (count := len(self.pieces)):
            place = count - self.period + (place - count) % self.period
        return self.pieces[place]

    def totals(self, rounds: int) -> list[dict[str, LowRank]]:
        """The sums of the pieces after 0, 1, ... ``rounds`` rounds, float64."""
        total = {n: shape_lowrank(s, 0, torch.float64) for n, s in self.shapes.items()}
        found = [total]
        for round_ in range(1, rounds + 1):
            total = dict(total)
            for name, piece in self.of_round(round_).items():
                total[name] = _sum(total[name], piece)
            found.append(total)
        return found


def find_remainders(
    rule: Rule,
    spec: AdapterSpec,
    specs: Mapping[str, AdapterSpec],
    clients: Sequence[str],
) -> Remainders:
    """Reduce a round or two of random updates.

    Args:
        rule: of the run's method.
        spec: the common adapter.
        specs: the adapters of the clients that have another one, by client.
        clients: those of a round.
    """
    kinds: dict[tuple[ModuleSpec, ...], list[str]] = {}
    own = each_once(specs)[0]
    for name, module in spec.modules.items():
        kinds.setdefault((module, *(x.modules[name] for x in own.values())), []).append(name)
    period = len(rule.halves)
    rounds = period * (_SETTLED if rule.remembers else 2)
    pieces: list[dict[str, LowRank]] = [{} for _ in range(rounds)]
    for names in kinds.values():
        for found, piece in zip(
            pieces, _tried(rule, spec, specs, clients, names[0], rounds), strict=True
        ):
            if piece is not None and not piece.is_zero:
                rank = rank_of(piece)
                found |= {name: shape_lowrank(piece.shape, rank, PIECE) for name in names}
    shapes = {name: (m.d_out, m.d_in) for name, m in spec.modules.items()}
    return Remainders(pieces, period, shapes)


def _tried(
    rule: Rule,
    spec: AdapterSpec,
    specs: Mapping[str, AdapterSpec],
    clients: Sequence[str],
    name: str,
    rounds: int,
) -> list[LowRank | None]:
    """The pieces of one module in the rounds that are tried."""
    single: dict[int, AdapterSpec] = {}
    for whole in (spec, *specs.values()):
        if id(whole) not in single:
            single[id(whole)] = replace(whole, modules={name: whole.modules[name]}, dense={})
    common, others = single[id(spec)], {c: single[id(x)] for c, x in specs.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kept, shared = each_once(others)
        own: dict[str, Adapter] = {client: _random(x) for client, x in kept.items()}
        own |= {client: own[first] for client, first in shared.items()}
        total = {name: LowRank.zeros(*_shape(common, name), torch.float64)}
        state = GlobalState(0, _ID, _random(common), total, {}, own)
        found: list[LowRank | None] = []
        memory: Mapping[str, Mapping[str, Tensor]] = {}
        for round_ in range(1, rounds + 1):
            sent = {id(x): rule.upload_spec(x, round_) for x in (common, *others.values())}
            form = CommonForm(state, sent[id(common)], {c: sent[id(x)] for c, x in others.items()})
            updates = [WeightedUpdate(_update(client, form), 1.0) for client in clients]
            sink = step_in_memory(state, rule)
            reduced = Reducer(form, rule, _fresh, memory=memory).reduce(updates, sink)
            found.append(reduced.step.pieces.get(name))
            memory = sink.memory
            # The next round needs what it starts from, and not the sum of what was before.
            state = replace(state.advance([reduced.step]), total=total)
        return found


def _update(client: str, form: CommonForm) -> HeldUpdate:
    spec = form.spec_of(client)
    tensors = {key: torch.randn(x.shape, dtype=x.dtype) for key, x in spec.tensors().items()}
    round_ = form.before.version + 1
    return HeldUpdate.of(ClientUpdate(client, round_, form.before.id, 1, 0.0, "", tensors), form)


def _random(spec: AdapterSpec) -> dict[str, Factors]:
    return {
        name: Factors(
            *(torch.randn(m.factor(x).shape, dtype=m.dtype) for x in "AB"),
        )
        for name, m in spec.modules.items()
    }


def _fresh(spec: AdapterSpec) -> dict[str, Factors]:
    """New factors, whose product is zero as that of PEFT's."""
    return {n: Factors(pair.A, torch.zeros_like(pair.B)) for n, pair in _random(spec).items()}


def _shape(spec: AdapterSpec, name: str) -> tuple[int, int]:
    return spec.modules[name].d_out, spec.modules[name].d_in


def _sum(total: LowRank, piece: LowRank) -> LowRank:
    """``total.accumulate(piece)`` of matrices in general position."""
    held, more = rank_of(total), rank_of(piece)
    rank = None if held is None or more is None else held + more
    if rank is not None and rank >= break_even(*total.shape):
        rank = None
    return shape_lowrank(total.shape, rank, torch.float64)
