"""The proof of a round: what the model applies against what it should apply.

The applied side is read back from the live model: the change of the frozen weight, and the factors
of every active adapter with PEFT's own scalings. The ideal side is the naive float64 sum of the
updates that were received. The two share no arithmetic with each other.

Beside that error stand what the layers make of it in the arithmetic that is used: ``forward``, the
error once every operand is rounded as its layer rounds it, and ``kept``, the share of the remainder
that comes out of the layers. Both are stated and stop no run: whoever asks for a narrow arithmetic
gets it, and ``auto`` places the remainder so that both hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import sqrt

from fedexlora.algebra.deviation import ratio
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, difference_norm
from fedexlora.errors import ExactnessError
from fedexlora.exchange.records import CertificateRecord, ModuleRecord, OwnRecord
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.forward import Kept, measure_kept, multiplied
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.aggregation import Aggregate, RoundSums
from fedexlora.rounds.screening import strain_reason

Forward = Callable[[], None]
"""Runs the model on some real inputs."""
TOLERANCE = 1e-6
"""Largest accepted error of an update, relative to it, beside the rounding of a folded weight."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The measured exactness of one round."""

    overall: CertificateRecord
    modules: tuple[ModuleRecord, ...]
    deviation: float
    """|R| / |M| over all modules, scaled."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """Scaled Frobenius norms of one module, and what comes out of its remainder."""

    name: str
    ideal: float
    error: float
    rounding: float
    truncated: float
    update: float
    """Of the ideal update since version 0."""
    narrowed: float
    """Of what the layer multiplies by, less that update."""
    kept: Kept | None


def certify(
    model: AdaptedModel,
    sums: RoundSums,
    aggregate: Aggregate,
    specs: Mapping[str, AdapterSpec],
    forwards: Mapping[Arithmetic, Forward] | None = None,
) -> Certificate:
    """Measure a model that has just become the next version; it is left as it was.

    Args:
        model: the model, with the next version applied.
        sums: the round's received updates.
        aggregate: what was applied.
        specs: the adapters of the clients that have another one than the model, by client.
        forwards: by arithmetic in which the model is used: runs it so on some real inputs. Without
            any, what comes out of the layers is not measured.
    """
    ideals = {
        name: sums.ideal(name).scaled(spec.scaling) for name, spec in model.spec.modules.items()
    }
    kept = _kept(model, aggregate, forwards or {})
    measured = [
        _measure(model, name, ideals[name], aggregate, kept.get(name)) for name in model.modules
    ]
    deviations = sums.deviations()
    modules = tuple(
        ModuleRecord(
            module=m.name,
            ideal=m.ideal,
            error=ratio(m.error, m.ideal),
            allowed=TOLERANCE + ratio(m.rounding + m.truncated, m.ideal),
            forward=ratio(m.narrowed, m.update),
            kept=m.kept.share if m.kept else None,
            kept_error=m.kept.standard_error if m.kept else None,
            deviation=deviations[m.name].relative,
            truncated=ratio(m.truncated, m.ideal),
            placement=model.placement(m.name),
            remainder=_form(aggregate.state.total[m.name]),
        )
        for m in measured
    )
    # In the model's order: a state read from disk has another, and sums would differ in last bits.
    scalings = [(name, spec.scaling) for name, spec in model.spec.modules.items()]
    lost = _norm([scaling * deviations[name].residual for name, scaling in scalings])
    whole = _norm([scaling * deviations[name].ideal for name, scaling in scalings])
    overall = _overall(model, measured, modules, _dense_error(model, sums))
    own = _own_records(model, aggregate, specs, ideals)
    held = overall.held and all(record.error <= overall.allowed for record in own)
    overall = overall.model_copy(update={"own": own, "held": held})
    return Certificate(overall, modules, ratio(lost, whole))


def enforce(certificate: Certificate, sums: RoundSums, round_: int) -> None:
    """Stop a run whose model does not apply the ideal.

    Args:
        certificate: the round's.
        sums: the updates that it is about.
        round_: from 1.

    Raises:
        ExactnessError: naming every module that is off, its error and what is allowed, and clients
            that may be the cause.
    """
    if certificate.overall.held:
        return
    faults = [
        f"{m.module}: error {m.error:.2e} of the update, allowed {m.allowed:.2e}"
        for m in certificate.modules
        if not m.error <= m.allowed  # NaN is neither
    ]
    faults += [
        f"client {own.client}: error {own.error:.2e} of the update, as it applies it"
        for own in certificate.overall.own
        if not own.error <= certificate.overall.allowed
    ]
    if not certificate.overall.dense_error <= TOLERANCE:
        faults.append(f"heads and biases: error {certificate.overall.dense_error:.2e}")
    strained = sums.strained()
    faults += [f"client {client}: {strain_reason(strain)}" for client, strain in strained.items()]
    if strained:
        named = ", ".join(f'"{client}"' for client in strained)
        faults.append(f"to go on without: --resume --set 'federation.exclude=[{named}]'")
    raise ExactnessError(f"round {round_}: the applied update is not the ideal one", faults)


def _measure(
    model: AdaptedModel, name: str, ideal: LowRank, aggregate: Aggregate, kept: Kept | None
) -> _Measured:
    update = model.update_of(name, ideal)
    return _Measured(
        name,
        ideal=sqrt(ideal.squared_norm()),
        error=difference_norm(model.applied(name), ideal),
        rounding=model.fold_rounding(name),
        truncated=model.spec.modules[name].scaling * aggregate.truncated[name],
        update=sqrt(update.squared_norm()),
        narrowed=max(
            difference_norm(multiplied(model, name, arithmetic), update)
            for arithmetic in model.arithmetics
        ),
        kept=kept,
    )


def _kept(
    model: AdaptedModel, aggregate: Aggregate, forwards: Mapping[Arithmetic, Forward]
) -> Mapping[str, Kept]:
    """What comes out of every module's remainder, in the arithmetic that is furthest from all."""
    found = [measure_kept(model, aggregate.state.total, forward) for forward in forwards.values()]
    return max(found, key=lambda kept: abs(_pooled(kept.values()).share - 1.0), default={})


def _pooled(kept: Iterable[Kept]) -> Kept:
    return reduce(Kept.plus, kept, Kept())


def _overall(
    model: AdaptedModel,
    measured: list[_Measured],
    modules: tuple[ModuleRecord, ...],
    dense_error: float,
) -> CertificateRecord:
    ideal = _norm([m.ideal for m in measured])
    excused = _norm([m.rounding + m.truncated for m in measured])
    worst = max(modules, key=lambda m: m.error / m.allowed)
    narrowest = max(modules, key=lambda m: m.forward)
    kept = [m.kept for m in measured if m.kept]
    pooled = _pooled(kept)
    return CertificateRecord(
        placement=" and ".join(sorted({model.placement(name) for name in model.modules})),
        error=ratio(_norm([m.error for m in measured]), ideal),
        allowed=TOLERANCE + ratio(excused, ideal),
        truncated=ratio(_norm([m.truncated for m in measured]), ideal),
        worst_module=worst.module,
        worst_error=worst.error,
        forward=ratio(_norm([m.narrowed for m in measured]), _norm([m.update for m in measured])),
        worst_forward_module=narrowest.module,
        worst_forward=narrowest.forward,
        kept=pooled.share if kept else None,
        kept_error=pooled.standard_error if kept else None,
        dense_error=dense_error,
        own=(),
        held=all(m.error <= m.allowed for m in modules) and dense_error <= TOLERANCE,
    )


def _own_records(
    model: AdaptedModel,
    aggregate: Aggregate,
    specs: Mapping[str, AdapterSpec],
    ideals: Mapping[str, LowRank],
) -> tuple[OwnRecord, ...]:
    """The same for every client with an adapter of its own, in the model that it will train."""
    whole = _norm([sqrt(ideal.squared_norm()) for ideal in ideals.values()])
    records = []
    for client in sorted(aggregate.state.own):  # a state read from disk has another order
        model.enter(aggregate.state, client, specs.get(client))
        errors = [difference_norm(model.applied(name), ideal) for name, ideal in ideals.items()]
        records.append(OwnRecord(client=client, error=ratio(_norm(errors), whole)))
    if records:
        model.enter(aggregate.state)
    return tuple(records)


def _dense_error(model: AdaptedModel, sums: RoundSums) -> float:
    """Heads and biases in the model against their mean in float64."""
    applied, ideal = model.dense(), sums.dense_ideal()
    errors = [float((applied[name].double() - ideal[name]).norm()) for name in applied]
    return ratio(_norm(errors), _norm([float(ideal[name].norm()) for name in applied]))


def _form(total: LowRank) -> str:
    if total.is_zero:
        return "none"
    return f"rank {total.value.rank}" if isinstance(total.value, Factors) else "dense"


def _norm(values: list[float]) -> float:
    return sqrt(sum(value * value for value in values))
