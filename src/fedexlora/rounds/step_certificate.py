"""The server's half of the certificate: the step of a round against the ideal, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import hypot, isnan, nan

from fedexlora.algebra.deviation import ratio
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import ExactnessError
from fedexlora.exchange.records import CertificateRecord, ModuleRecord
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.peft_bridge.export_check import TOLERANCE
from fedexlora.rounds.reduction import Reduction
from fedexlora.rounds.screening import strain_reason

AT_CLIENTS = "clients"
"""Where the remainder lives as far as a server without a model knows."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The measured exactness of one round."""

    overall: CertificateRecord
    modules: tuple[ModuleRecord, ...]
    deviation: float
    """|R| / |M| over all modules, scaled."""


def certify_step(spec: AdapterSpec, state: GlobalState, reduction: Reduction) -> Certificate:
    """What holds of a step, whoever applies it.

    What holders make of it is theirs to say: errors are those of the step alone.

    Args:
        spec: the common adapter.
        state: the version that the step has led to.
        reduction: what led there, with its figures.
    """
    modules = tuple(_module(name, spec, state, reduction) for name in spec.modules)
    norms = {m.module: m.ideal for m in modules}
    ideal = hypot(*norms.values())
    worst = max(modules, key=lambda m: m.error / m.allowed)
    errors = [ratio(rounded, norm) for rounded, norm in reduction.heads.values()]
    dense_error = nan if any(map(isnan, errors)) else max(errors, default=0.0)

    def overall(figure: Callable[[ModuleRecord], float]) -> float:
        return ratio(hypot(*(figure(m) * norms[m.module] for m in modules)), ideal)

    record = CertificateRecord(
        placement=AT_CLIENTS,
        error=overall(lambda m: m.error),
        bound=overall(lambda m: m.bound),
        allowed=TOLERANCE + overall(lambda m: m.truncated),
        truncated=overall(lambda m: m.truncated),
        worst_module=worst.module,
        worst_error=worst.error,
        forward=None,
        worst_forward_module=None,
        worst_forward=None,
        kept=None,
        kept_error=None,
        dense_error=dense_error,
        own=(),
        held=all(m.bound <= m.allowed for m in modules) and dense_error <= TOLERANCE,
    )
    return Certificate(record, modules, deviation_of(reduction, spec))


def deviation_of(reduction: Reduction, spec: AdapterSpec) -> float:
    """|R| / |M| of a round over all modules, scaled."""
    found = [(m.scaling, reduction.modules[name].deviation) for name, m in spec.modules.items()]
    lost = hypot(*(scaling * x.residual for scaling, x in found))
    return ratio(lost, hypot(*(scaling * x.ideal for scaling, x in found)))


def enforce(
    certificate: Certificate, round_: int, strained: Callable[[], Mapping[str, float]]
) -> None:
    """Stop a run whose model does not apply the ideal.

    Args:
        certificate: the round's.
        round_: from 1.
        strained: finds the clients for whose sake the mean of factors cancels beyond what float32
            holds, and how much.

    Raises:
        ExactnessError: naming every module that is off, its error and what is allowed, and clients
            that may be the cause.
    """
    if certificate.overall.held:
        return
    faults = [
        f"{m.module}: error {m.error:.2e} of the update, at most {m.bound:.2e}, "
        f"allowed {m.allowed:.2e}"
        for m in certificate.modules
        if not m.bound <= m.allowed  # NaN is neither
    ]
    faults += [
        f"client {own.client}: error {own.error:.2e} of the update, as it applies it"
        for own in certificate.overall.own
        if not own.held
    ]
    if not certificate.overall.dense_error <= TOLERANCE:
        faults.append(f"heads and biases: error {certificate.overall.dense_error:.2e}")
    found = strained()
    faults += [f"client {client}: {strain_reason(strain)}" for client, strain in found.items()]
    if found:
        named = ", ".join(f'"{client}"' for client in found)
        faults.append(f"to go on without: --resume --set 'federation.exclude=[{named}]'")
    raise ExactnessError(f"round {round_}: the applied update is not the ideal one", faults)


def form_of(total: LowRank) -> str:
    """How a cumulative remainder is held."""
    if total.is_zero:
        return "none"
    return f"rank {total.value.rank}" if isinstance(total.value, Factors) else "dense"


def _module(name: str, spec: AdapterSpec, state: GlobalState, reduction: Reduction) -> ModuleRecord:
    figures, scaling = reduction.modules[name], spec.modules[name].scaling
    truncated = ratio(figures.truncated, figures.ideal)
    return ModuleRecord(
        module=name,
        ideal=scaling * figures.ideal,
        error=ratio(figures.error.value, figures.ideal),
        bound=ratio(figures.error.bound, figures.ideal),
        allowed=TOLERANCE + truncated,
        forward=None,
        kept=None,
        kept_error=None,
        deviation=figures.deviation.relative,
        truncated=truncated,
        added=ratio(figures.added, figures.ideal),
        memory_error=ratio(figures.memory_error, figures.ideal),
        placement=AT_CLIENTS,
        remainder=form_of(state.total[name]),
        mean_product=scaling * figures.deviation.ideal,
    )
