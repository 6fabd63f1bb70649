"""One round's updates, streamed: nothing of a client is kept once it is added.

Clients may have adapters of their own rank and scaling. Everything is summed in the scaling of the
model's common adapter, so that the ideal of a round is, by module and before that scaling,

    total + sum_i p_i (B A - c_i B_i0 A_i0)  +  sum_i p_i c_i B_i A_i  [+  p_0 B A]

where ``(A_i0, B_i0)`` is what client ``i`` started from, ``c_i`` its scaling over the common one,
and the middle term, what clients hold beside the weight for their own adapters, is zero for all
that start from the common adapter ``(A, B)``. A late update of an earlier version is the same
case: it started from that version's adapter, and its change is put on the model of now. ``p_0`` is
the share that stays with the version of the round when changes count in part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from fedexlora.algebra import assignment, robust
from fedexlora.algebra.assignment import Holder
from fedexlora.algebra.deviation import Deviation, deviation
from fedexlora.algebra.factors import Factors, Sizes, sizes
from fedexlora.algebra.lowrank import LowRank
from fedexlora.algebra.moments import Moments
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.step import Step
from fedexlora.exchange.step_writer import StepBuilder, StepSink
from fedexlora.exchange.update import ClientUpdate
from fedexlora.methods import Method
from fedexlora.rounds.screening import MOST_STRAIN

Adapter = Mapping[str, Factors]
FreshFactors = Callable[[AdapterSpec], Adapter]
"""Newly initialised factors of given ranks, by module."""


@dataclass(frozen=True, slots=True)
class Aggregate:
    """What a method makes of one round's updates."""

    state: GlobalState
    """The version that is reached."""
    step: Step
    """What leads there."""
    truncated: Mapping[str, float]
    """By module, the norm of what a truncated remainder lacks, unscaled; 0 if nothing was."""


class RoundSums:
    """Weighted sums over the clients of one round.

    Two sums are kept for every module: the moments that the method aggregates, and the plain sum
    of products in float64 that its result is held against. Heads are summed in float64.

    Args:
        state: the version that the clients trained from.
        spec: the common adapter.
        specs: the adapters of the clients that have another one, by client.
    """

    def __init__(
        self, state: GlobalState, spec: AdapterSpec, specs: Mapping[str, AdapterSpec]
    ) -> None:
        self._state = state
        self._spec = spec
        self._specs = specs
        every = [spec, *specs.values()]
        self._rank = {name: max(s.modules[name].rank for s in every) for name in spec.modules}
        self._moments: dict[str, Moments] = {}
        zeros = {
            name: LowRank.zeros(*factors.shape, torch.float64)
            for name, factors in state.adapter.items()
        }
        self._products, self._offsets = dict(zeros), dict(zeros)
        self._dense = {name: torch.zeros_like(t.double()) for name, t in state.dense.items()}
        self._sent: dict[str, Adapter] = {}
        self._counted: dict[str, float] = {}
        self._sizes: dict[str, list[Sizes]] = {name: [] for name in zeros}
        self.weight = 0.0

    def add(
        self,
        update: ClientUpdate,
        weight: float,
        start: GlobalState | None = None,
        *,
        remember: bool = False,
    ) -> None:
        """Add one checked update.

        Args:
            update: the update.
            weight: what it counts; only ratios matter.
            start: what it was trained from, if that is not the version of this round.
            remember: keep its factors, for a method whose clients continue from them.
        """
        self.weight += weight
        start = start or self._state
        held = start.adapter_of(update.client)
        sent = {name: update.factors(name, pair) for name, pair in held.items()}
        if remember:
            self._sent[update.client] = sent
        self._counted[update.client] = weight
        for name, raw in sent.items():
            scale = self._scale(update.client, name)
            factors = self._common(raw, scale).padded(self._rank[name])
            self._add_factors(name, factors, weight)
            self._sizes[name].append(sizes(factors))
            product = raw.to(torch.float64).scaled(weight * scale)
            self._products[name] = self._products[name].plus([product])
            if held is not self._state.adapter:
                common = self._state.adapter[name].to(torch.float64).scaled(weight)
                minus = held[name].to(torch.float64).scaled(-weight * scale)
                self._offsets[name] = self._offsets[name].plus([common, minus])
        for name, total in self._dense.items():
            rebased = update.tensors[f"dense/{name}"].double()
            if start is not self._state:
                # Not in place: of a float64 head, `double` is the caller's own tensor.
                rebased = rebased + (self._state.dense[name].double() - start.dense[name].double())
            total.add_(rebased, alpha=weight)

    def stay(self, weight: float) -> None:
        """Add the version that the round started from, as a client that changed nothing.

        Args:
            weight: what it counts; only ratios matter.
        """
        self.weight += weight
        for name, held in self._state.adapter.items():
            self._add_factors(name, held.padded(self._rank[name]), weight)
            product = held.to(torch.float64).scaled(weight)
            self._products[name] = self._products[name].plus([product])
        for name, total in self._dense.items():
            total.add_(self._state.dense[name].double(), alpha=weight)

    def aggregate(
        self,
        method: Method,
        fresh: FreshFactors,
        sink: StepSink | None = None,
        held: Mapping[str, int | None] | None = None,
    ) -> Aggregate:
        """The next version by ``method``, and the step that leads to it.

        Args:
            method: what makes the next adapter and the remainder.
            fresh: draws new factors.
            sink: takes in the step; in memory if there is none.
            held: what the round changed of what clients hold, for the step's file.
        """
        fresh = _once(fresh)
        sink = sink or StepBuilder(self._state.version + 1, self._state.id, method.trained)
        truncated: dict[str, float] = {}
        for name, moments in self._moments.items():
            holder = self._holder(None, self._spec, name, fresh)
            wide = method.assignment(moments, holder)
            adapter = wide.to(self._spec.modules[name].dtype)
            kept, lacks = method.remainder(assignment.remainder(moments, wide))
            truncated[name] = lacks if method.truncates else 0.0
            sink.add(name, adapter, self._with_offset(name, kept))
        dense = {
            name: mean.to(self._state.dense[name].dtype)
            for name, mean in self.dense_ideal().items()
        }
        own = self._own_adapters(method, fresh)
        step = sink.finish(dense, *self._state.changed(own), held or {})
        return Aggregate(self._state.advance([step]), step, truncated)

    def ideal(self, module: str) -> LowRank:
        """What the module should add to its untouched weight: float64, before the scaling."""
        parts = (self._products[module], self._offsets[module])
        return self._state.total[module].plus([x.scaled(1.0 / self.weight).value for x in parts])

    def dense_ideal(self) -> Mapping[str, Tensor]:
        """The means of heads and biases, float64, by name."""
        return {name: total / self.weight for name, total in self._dense.items()}

    def deviations(self) -> Mapping[str, Deviation]:
        """What averaging the factors loses, by module."""
        return {name: deviation(moments) for name, moments in self._moments.items()}

    def strained(self) -> Mapping[str, float]:
        """Clients for whose sake the mean of factors cancels beyond what float32 holds, and how."""
        weights = [weight / self.weight for weight in self._counted.values()]
        found = dict.fromkeys(self._counted, 0.0)
        for name, known in self._sizes.items():
            mean = sqrt(self._products[name].squared_norm()) / self.weight
            for client, strain in zip(found, robust.strain(weights, known, mean), strict=True):
                found[client] = max(found[client], strain)
        return {client: strain for client, strain in found.items() if strain > MOST_STRAIN}

    def _add_factors(self, name: str, factors: Factors, weight: float) -> None:
        before = self._moments.get(name)
        self._moments[name] = before.add(factors, weight) if before else Moments.of(factors, weight)

    def _scale(self, client: str, module: str) -> float:
        """The client's scaling over the common one."""
        spec = self._specs.get(client)
        if spec is None:
            return 1.0
        return spec.modules[module].scaling / self._spec.modules[module].scaling

    def _common(self, raw: Factors, scale: float) -> Factors:
        """A client's factors in the common scaling, without rounding what is not rescaled."""
        return raw if scale == 1.0 else raw.to(torch.float64).scaled(scale)

    def _with_offset(self, name: str, piece: LowRank) -> LowRank:
        """A piece of remainder plus what clients hold beside the weight for their own adapters."""
        offset = self._offsets[name]
        if offset.is_zero:
            return piece
        whole = piece.to(torch.float64).accumulate(offset.scaled(1.0 / self.weight))
        return whole.to(piece.value.dtype)

    def _own_adapters(self, method: Method, fresh: FreshFactors) -> dict[str, Adapter]:
        """What the clients that do not continue from the common adapter continue from."""
        if method.own_adapters:
            return {**self._state.own, **self._sent}
        return {
            client: {
                name: method.assignment(moments, self._holder(client, spec, name, fresh))
                .scaled(1.0 / self._scale(client, name))
                .to(spec.modules[name].dtype)
                for name, moments in self._moments.items()
            }
            for client, spec in self._specs.items()
        }

    def _holder(
        self, client: str | None, spec: AdapterSpec, name: str, fresh: FreshFactors
    ) -> Holder:
        """Whom an adapter of ``spec`` is for: a client with its own, or all others."""
        held = self._state.adapter if client is None else self._state.own[client]
        scale = 1.0 if client is None else self._scale(client, name)
        return Holder(
            spec.modules[name].rank,
            self._common(held[name], scale),
            lambda: self._common(fresh(spec)[name], scale),
        )


def _once(fresh: FreshFactors) -> FreshFactors:
    """``fresh``, which draws the factors of all modules, called once for each spec."""
    made: dict[int, Adapter] = {}

    def drawn(spec: AdapterSpec) -> Adapter:
        if id(spec) not in made:
            made[id(spec)] = fresh(spec)
        return made[id(spec)]

    return drawn
