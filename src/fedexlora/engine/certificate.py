"""The proof of a round: what the model applies against what it should apply.

The applied side is read back from the live model (the change of the frozen weight plus PEFT's own
``get_delta_weight``); the ideal side is the naive float64 sum of the updates that were received.
The two share no arithmetic with each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from fedexlora.algebra.deviation import ratio
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.engine.aggregation import RoundSums
from fedexlora.errors import ExactnessError
from fedexlora.exchange.records import CertificateRecord, ModuleRecord
from fedexlora.exchange.state import GlobalState
from fedexlora.peft_bridge.model import AdaptedModel

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
    """Scaled Frobenius norms of one module."""

    name: str
    ideal: float
    error: float
    rounding: float


def certify(
    model: AdaptedModel, sums: RoundSums, before: GlobalState, after: GlobalState
) -> Certificate:
    """Measure a model that has just become the next version.

    Args:
        model: the model, with the next version applied.
        sums: the round's received updates.
        before: the version that the clients trained from.
        after: the version that should be applied.
    """
    measured = [_measure(model, name, sums, before) for name in model.modules]
    deviations = sums.deviations()
    modules = tuple(
        ModuleRecord(
            module=m.name,
            ideal=m.ideal,
            error=ratio(m.error, m.ideal),
            allowed=TOLERANCE + ratio(m.rounding, m.ideal),
            deviation=deviations[m.name].relative,
            remainder=_form(after.total[m.name]),
        )
        for m in measured
    )
    # In the model's order: a state read from disk has another, and sums would differ in last bits.
    lost = _norm([x.scaling * deviations[name].residual for name, x in model.modules.items()])
    whole = _norm([x.scaling * deviations[name].ideal for name, x in model.modules.items()])
    dense_error = _dense_error(model, sums)
    return Certificate(_overall(measured, modules, dense_error), modules, ratio(lost, whole))


def enforce(certificate: Certificate, round_: int) -> None:
    """Stop a run whose model does not apply the ideal.

    Raises:
        ExactnessError: naming every module that is off, its error and what is allowed.
    """
    if certificate.overall.held:
        return
    faults = [
        f"{m.module}: error {m.error:.2e} of the update, allowed {m.allowed:.2e}"
        for m in certificate.modules
        if m.error > m.allowed
    ]
    if certificate.overall.dense_error > TOLERANCE:
        faults.append(f"heads and biases: error {certificate.overall.dense_error:.2e}")
    raise ExactnessError(f"round {round_}: the applied update is not the ideal one", faults)


def _measure(model: AdaptedModel, name: str, sums: RoundSums, before: GlobalState) -> _Measured:
    applied = model.applied_update(name)
    ideal = model.modules[name].scaling * (before.total[name].dense() + sums.ideal(name))
    error = float((applied - ideal).norm())
    return _Measured(name, float(ideal.norm()), error, model.fold_rounding(name))


def _overall(
    measured: list[_Measured], modules: tuple[ModuleRecord, ...], dense_error: float
) -> CertificateRecord:
    ideal = _norm([m.ideal for m in measured])
    worst = max(modules, key=lambda m: m.error / m.allowed)
    return CertificateRecord(
        placement="fold",
        error=ratio(_norm([m.error for m in measured]), ideal),
        allowed=TOLERANCE + ratio(_norm([m.rounding for m in measured]), ideal),
        worst_module=worst.module,
        worst_error=worst.error,
        dense_error=dense_error,
        held=all(m.error <= m.allowed for m in modules) and dense_error <= TOLERANCE,
    )


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
