"""From the updates of a round to the step that leads to the next version, module by module.

Updates come in the common form, which has one rank and one scaling. By module, and before that
scaling, the ideal of a round is

    total + sum_i p_i (B A - B_i0 A_i0)  +  sum_i p_i B_i A_i  [+  p_0 B A]

where ``(A_i0, B_i0)`` is what client ``i`` started from. The middle term, what clients hold beside
the weight for adapters of their own, is zero for all that start from the common adapter ``(A, B)``,
and for all where a method gives clients nothing to make up for theirs.
``p_0`` is the share that stays with the version of the round when changes count in part.

The method makes of one module's updates the next adapter and the piece of remainder that leads
there. What it made is held against the ideal at once, by the naive float64 sum of what was received
(or its image of random probes, where the module is large): one half of the certificate. It shares
no arithmetic with the method. Nothing of a module stays in memory but these figures, and the
factors of clients that have an adapter of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from fedexlora.algebra.assignment import Holder
from fedexlora.algebra.deviation import Deviation, deviation
from fedexlora.algebra.factors import Factors, squared_norm
from fedexlora.algebra.lowrank import LowRank
from fedexlora.algebra.probes import Norm, Probes
from fedexlora.exchange.layout import each_once
from fedexlora.exchange.seeds import derive_seed
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.step import PIECE, Step
from fedexlora.exchange.step_writer import StepBuilder, StepSink
from fedexlora.exchange.version import Adapter
from fedexlora.methods.rule import ModuleRound, ModuleStep, Rule
from fedexlora.rounds.common_update import CommonForm, CommonUpdate

_PROCESSOR = torch.device("cpu")
_ROOM = 1e-3
"""By how much more of its own norm a truncation may lack than it states: rounding of small sums."""
FreshFactors = Callable[[AdapterSpec], Adapter]
"""Newly initialised factors of given ranks, by module."""


@dataclass(frozen=True, slots=True)
class WeightedUpdate:
    """An update and what it counts."""

    update: CommonUpdate
    weight: float
    """Only ratios matter."""


@dataclass(frozen=True, slots=True)
class ModuleFigures:
    """What was measured of one module's reduction; norms are Frobenius, unscaled."""

    error: Norm
    """Of the step less the ideal."""
    ideal: float
    """Of the ideal update since the untouched base, and what the method adds to it."""
    deviation: Deviation
    """What averaging the factors would have lost."""
    truncated: float
    """What a truncated remainder lacks on purpose; 0 if nothing was."""
    added: float = 0.0
    """What the method added to the ideal on purpose, as momentum."""
    memory_error: float = 0.0
    """What the server's memory of the module lacks, held at a lower rank."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """What a method has made of one round's updates."""

    step: Step
    """What leads to the next version."""
    modules: Mapping[str, ModuleFigures]
    """By module, in the order of the spec."""
    heads: Mapping[str, tuple[float, float]]
    """By head and bias: the norm of its rounding, and that of the mean, which is float64."""


@dataclass(slots=True)
class Reducer:
    """Reduces the updates of one round.

    Args:
        form: of the updates; its version is the one that the round starts from.
        rule: what is made of them.
        fresh: draws new factors.
        seed: of the probes.
        stay: what the version itself counts beside the updates.
        device: where a module's updates are reduced; it is held against the ideal on the processor.
        memory: what the server remembers of the modules from the round before.
    """

    form: CommonForm
    rule: Rule
    fresh: FreshFactors
    seed: int = 0
    stay: float = 0.0
    device: torch.device = _PROCESSOR
    memory: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    _drawn: dict[int, Adapter] = field(default_factory=dict)

    def reduce(
        self,
        updates: Sequence[WeightedUpdate],
        sink: StepSink,
        held: Mapping[str, int | None] | None = None,
    ) -> Reduction:
        """The step to the next version, and what was measured of it.

        Args:
            updates: at least one, in the order in which they are added up.
            sink: takes in the step while it is made.
            held: by client whose holding the round changed, the version; None for nothing.
        """
        before, spec = self.form.before, self.form.spec
        weight = sum(x.weight for x in updates) + self.stay
        figures: dict[str, ModuleFigures] = {}
        kept, shared = each_once(self.form.specs)
        drawn: dict[str, dict[str, Factors]] = {client: {} for client in kept}
        norms = self._norms(updates)
        for name in spec.modules:
            made = self._module(name, updates, weight, norms)
            sink.add(name, made.adapter, made.piece, made.memory)
            figures[name] = made.figures
            for client, pair in made.own.items():
                drawn[client][name] = pair
        heads: dict[str, Tensor] = {}
        rounding: dict[str, tuple[float, float]] = {}
        for name in spec.dense:
            mean = self._mean(name, updates, weight)
            heads[name] = mean.to(before.dense[name].dtype)
            rounding[name] = float((heads[name].double() - mean).norm()), float(mean.norm())
        own: Mapping[str, Adapter] = drawn | {client: drawn[x] for client, x in shared.items()}
        if self.rule.own_adapters:
            own = {**before.own, **{x.update.client: self.form.sent(x.update) for x in updates}}
        step = sink.finish(heads, *before.changed(own), held or {})
        return Reduction(step, figures, rounding)

    def _module(
        self,
        name: str,
        updates: Sequence[WeightedUpdate],
        weight: float,
        norms: Mapping[str, tuple[float, ...]],
    ) -> _ModuleResult:
        """What the method makes of a module, and what was measured of it."""
        offset = self._offset(name, updates, weight)
        with torch.device(self.device):
            module = self._module_round(name, updates, offset.on(self.device), norms)
            made = self.rule.server(module)
            lost = deviation(module.moments)
        spec = self.form.spec.modules[name]
        adapter = made.adapter.to(spec.dtype).on(_PROCESSOR)
        piece = made.remainder.on(_PROCESSOR)
        if not offset.is_zero:
            piece = piece.to(torch.float64).accumulate(offset)
        piece = piece.to(PIECE)
        error, ideal = self._held(name, updates, weight, (adapter, piece), made)
        lacks = made.truncation.lacks if made.truncation else 0.0
        error = Norm(error.value, error.bound + lacks)
        added = 0.0 if made.added is None else sqrt(made.added.squared_norm())
        figures = ModuleFigures(error, ideal, lost, lacks, added, made.memory_error)
        own = {client: self._sent(client, name, pair) for client, pair in made.own.items()}
        memory = {letter: tensor.to(_PROCESSOR) for letter, tensor in made.memory.items()}
        return _ModuleResult(adapter, piece, own, memory, figures)

    def _module_round(
        self,
        name: str,
        updates: Sequence[WeightedUpdate],
        offset: LowRank,
        norms: Mapping[str, tuple[float, ...]],
    ) -> ModuleRound:
        """One module as the method sees it, on the device."""
        remembered = self.memory.get(name, {})
        stays = [self.form.ranks[name]] if self.stay > 0.0 else []
        ranks = [self.form.spec_of(x.update.client).modules[name].rank for x in updates]
        return ModuleRound(
            name=name,
            round=self.form.before.version + 1,
            scaling=self.form.spec.modules[name].scaling,
            clients=lambda: self._on_device(name, updates),
            holder=self._holder(None, self.form.spec, name),
            owners={client: self._holder(client, spec, name) for client, spec in self._owners()},
            offset=offset,
            memory={letter: tensor.to(self.device) for letter, tensor in remembered.items()},
            ranks=(*stays, *ranks),
            norms=norms,
        )

    def _owners(self) -> Iterable[tuple[str, AdapterSpec]]:
        """The clients for which the server makes adapters of their own; each adapter once."""
        if self.rule.own_adapters:
            return ()
        return each_once(self.form.specs)[0].items()

    def _norms(self, updates: Sequence[WeightedUpdate]) -> dict[str, tuple[float, ...]]:
        """By module, the norm of every update's product, if the method looks at them first."""
        if not self.rule.surveys:
            return {}
        return {
            name: tuple(sqrt(squared_norm(pair)) for pair, _ in self._clients(name, updates))
            for name in self.form.spec.modules
        }

    def _clients(
        self, name: str, updates: Sequence[WeightedUpdate]
    ) -> Iterator[tuple[Factors, float]]:
        """Factors and weights, one after the other; the version itself first, if it counts."""
        if self.stay > 0.0:
            yield self.form.common(name), self.stay
        for counted in updates:
            yield counted.update.factors(name), counted.weight

    def _on_device(
        self, name: str, updates: Sequence[WeightedUpdate]
    ) -> Iterator[tuple[Factors, float]]:
        return ((pair.on(self.device), weight) for pair, weight in self._clients(name, updates))

    def _start(self, counted: WeightedUpdate, name: str) -> Factors | None:
        """What an update was trained from, where the weight makes up for it."""
        return counted.update.start(name) if self.rule.makes_up else None

    def _offset(self, name: str, updates: Sequence[WeightedUpdate], weight: float) -> LowRank:
        """What clients hold beside the weight for their own adapters, on average, float64."""
        offset = LowRank.zeros(*self.form.before.adapter[name].shape, torch.float64)
        for counted in updates:
            start = self._start(counted, name)
            if start is not None:
                share = counted.weight / weight
                common = self.form.before.adapter[name].to(torch.float64).scaled(share)
                offset = offset.plus([common, start.to(torch.float64).scaled(-share)])
        return offset

    def _held(
        self,
        name: str,
        updates: Sequence[WeightedUpdate],
        weight: float,
        sent: tuple[Factors, LowRank],
        made: ModuleStep,
    ) -> tuple[Norm, float]:
        """The error of what is sent against the ideal, and the norm of the ideal.

        What the method adds on purpose is part of the ideal. The bound is that of everything but
        what is left out on purpose, whose norm is known and which random probes could only
        estimate.

        Args:
            name: the module.
            updates: of the round.
            weight: of all that count.
            sent: adapter and piece.
            made: what the method says of it.
        """
        adapter, piece = sent
        shape, before = piece.shape, self.form.before
        probes = Probes.of(shape, derive_seed(self.seed, before.version + 1, name))
        mean = probes.zeros(shape)
        for factors, counts in self._clients(name, updates):
            probes.add(mean, factors, counts / weight)
        for counted in updates:
            start = self._start(counted, name)
            if start is not None:
                probes.add(mean, before.adapter[name], counted.weight / weight)
                probes.add(mean, start, -counted.weight / weight)
        if made.added is not None:
            probes.add(mean, made.added.on(_PROCESSOR).value)
        error = probes.add(probes.zeros(shape), adapter)
        found = probes.norm(probes.add(error, piece.value).sub_(mean))
        if made.truncation is not None:
            cut = probes.add(probes.zeros(shape), made.truncation.whole.on(_PROCESSOR).value)
            probes.add(cut, made.truncation.kept.on(_PROCESSOR).value, -1.0)
            # More than is stated is an error like any other; what estimates miss is not.
            room = 1.0 + _ROOM if probes.exact else 2.0
            more = max(0.0, probes.norm(cut).value - room * made.truncation.lacks)
            found = Norm(found.value, probes.norm(error.add_(cut)).bound + more)
        if name in before.total:
            probes.add(mean, before.total[name].value)
        return found, probes.norm(mean).value

    def _mean(self, name: str, updates: Sequence[WeightedUpdate], weight: float) -> Tensor:
        """The mean of a head or bias, float64."""
        now = self.form.before.dense[name].double()
        total = now * self.stay
        for counted in updates:
            total.add_(counted.update.head(name).double(), alpha=counted.weight)
        return total.div_(weight)

    def _sent(self, client: str, name: str, pair: Factors) -> Factors:
        """A client's next adapter as it is sent: in its own scaling and dtype."""
        dtype = self.form.spec_of(client).modules[name].dtype
        return pair.scaled(1.0 / self.form.scale(client, name)).to(dtype).on(_PROCESSOR)

    def _holder(self, client: str | None, spec: AdapterSpec, name: str) -> Holder:
        """Whom an adapter of ``spec`` is for: a client with its own, or all others."""
        before = self.form.before
        held = before.adapter if client is None else before.own[client]
        scale = 1.0 if client is None else self.form.scale(client, name)
        return Holder(
            spec.modules[name].rank,
            _rescaled(held[name], scale).on(self.device),
            partial(self._fresh, spec, name, scale),
        )

    def _fresh(self, spec: AdapterSpec, name: str, scale: float) -> Factors:
        """New factors of a module; those of all modules are drawn at once, for each spec."""
        if id(spec) not in self._drawn:
            with torch.device(_PROCESSOR):
                self._drawn[id(spec)] = self.fresh(spec)
        return _rescaled(self._drawn[id(spec)][name], scale).on(self.device)


def step_in_memory(before: GlobalState, rule: Rule) -> StepBuilder:
    """What takes in a step that is small enough to be held."""
    version = before.version + 1
    return StepBuilder(version, before.id, rule.steps(version))


def drift(before: GlobalState, step: Step, after: GlobalState, module: str) -> Norm:
    """How far the adapter and total of a version are from what it was and the step, unscaled.

    Args:
        before: the version that the step leads on from.
        step: the step.
        after: the version that it led to, as somebody holds it.
        module: the module.
    """
    held, old = after.adapter[module], before.adapter[module]
    led = Factors(step.factors.get(f"A/{module}", old.A), step.factors.get(f"B/{module}", old.B))
    probes = Probes.of(held.shape, derive_seed(0, step.version, f"drift/{module}"))
    image = probes.add(probes.zeros(held.shape), held)
    probes.add(image, after.total[module].value)
    probes.add(image, led, -1.0)
    probes.add(image, before.total[module].value, -1.0)
    if module in step.pieces:
        probes.add(image, step.pieces[module].value, -1.0)
    return probes.norm(image)


@dataclass(frozen=True, slots=True)
class _ModuleResult:
    """What was made of one module."""

    adapter: Factors
    piece: LowRank
    own: Mapping[str, Factors]
    memory: Mapping[str, Tensor]
    figures: ModuleFigures


def _rescaled(pair: Factors, scale: float) -> Factors:
    """Factors in another scaling, without rounding what is not rescaled."""
    return pair if scale == 1.0 else pair.to(torch.float64).scaled(scale)
