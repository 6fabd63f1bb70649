"""The proof of a round: what the model applies against what it should apply.

It comes in two halves whose bounds add. The step against the ideal, the naive float64 sum of the
updates that were received, is measured where the step is made (``rounds.reduction``) and needs no
model. Here a live model is held against the adapter and the total of its version: the change of
the frozen weight, and the factors of every active adapter with PEFT's own scalings, are read back.
The halves share nothing but what norms are measured by (``algebra.probes``).

Beside that error stand what the layers make of it in the arithmetic that is used: ``forward``, the
error once every operand is rounded as its layer rounds it, and ``kept``, the share of the remainder
that comes out of the layers. Both are stated and stop no run: whoever asks for a narrow arithmetic
gets it, and ``auto`` places the remainder so that both hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import hypot, isnan, nan

from fedexlora.algebra.deviation import ratio
from fedexlora.algebra.probes import Norm
from fedexlora.exchange.layout import each_once
from fedexlora.exchange.records import CertificateRecord, ModuleRecord, OwnRecord
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.base_norms import bf16_loss
from fedexlora.peft_bridge.export_check import TOLERANCE
from fedexlora.peft_bridge.forward import Kept, measure_kept, multiplied_image
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.holder import Forward, held_against, held_error, probes_of, wanted_image
from fedexlora.rounds.reduction import ModuleFigures, Reduction
from fedexlora.rounds.step_certificate import Certificate, deviation_of, form_of


@dataclass(frozen=True, slots=True)
class _Measured:
    """Scaled Frobenius norms of one module, and what comes out of its remainder."""

    name: str
    scaling: float
    ideal: float
    error: Norm
    rounding: float
    truncated: float
    update: float
    """Of the update since version 0."""
    narrowed: float
    """Of what the layer multiplies by, less that update."""
    remainder: float
    """Of the cumulative remainder."""
    kept: Kept | None


def certify(
    model: AdaptedModel,
    state: GlobalState,
    reduction: Reduction,
    specs: Mapping[str, AdapterSpec],
    forwards: Mapping[Arithmetic, Forward] | None = None,
    *,
    makes_up: bool = True,
) -> Certificate:
    """Measure a model that has just become the next version; it is left as it was.

    Args:
        model: the model, with the version applied.
        state: the version.
        reduction: what led there, with its half of the certificate.
        specs: the adapters of the clients that have another one than the model, by client.
        forwards: by arithmetic in which the model is used: runs it so on some real inputs. Without
            any, what comes out of the layers is not measured.
        makes_up: whether clients with an adapter of their own hold the global model with it, and
            are measured too.
    """
    kept = _kept(model, state, forwards or {})
    # In the model's order: a state read from disk has another, and sums would differ in last bits.
    measured = [
        _measure(model, name, state, reduction.modules[name], kept.get(name))
        for name in model.modules
    ]
    modules = tuple(
        ModuleRecord(
            module=m.name,
            ideal=m.ideal,
            error=ratio(m.error.value, m.ideal),
            bound=ratio(m.error.bound, m.ideal),
            allowed=TOLERANCE + ratio(m.rounding + m.truncated, m.ideal),
            forward=ratio(m.narrowed, m.update),
            kept=m.kept.share if m.kept else None,
            kept_error=m.kept.standard_error if m.kept else None,
            deviation=reduction.modules[m.name].deviation.relative,
            truncated=ratio(m.truncated, m.ideal),
            added=ratio(m.scaling * reduction.modules[m.name].added, m.ideal),
            memory_error=ratio(m.scaling * reduction.modules[m.name].memory_error, m.ideal),
            placement=model.placement(m.name),
            remainder=form_of(state.total[m.name]),
            mean_product=m.scaling * reduction.modules[m.name].deviation.ideal,
            remainder_norm=m.remainder,
            bf16_loss=bf16_loss(model, m.name, state.total[m.name]),
        )
        for m in measured
    )
    overall = _overall(model, measured, modules, head_error(model, state, reduction))
    own = _own_records(model, state, specs, reduction, modules) if makes_up else ()
    held = overall.held and all(record.held for record in own)
    overall = overall.model_copy(update={"own": own, "held": held})
    return Certificate(overall, modules, deviation_of(reduction, model.spec))


def head_error(model: AdaptedModel, state: GlobalState, reduction: Reduction) -> float:
    """The head or bias of the model that is farthest from its mean in float64."""
    live, errors = model.dense(), [0.0]
    for name, (rounded, ideal) in reduction.heads.items():
        moved = float((live[name].double() - state.dense[name].double()).norm())
        errors.append(ratio(rounded + moved, ideal))
    return nan if any(map(isnan, errors)) else max(errors)


def _measure(
    model: AdaptedModel, name: str, state: GlobalState, figures: ModuleFigures, kept: Kept | None
) -> _Measured:
    scaling = model.spec.modules[name].scaling
    probes, start = probes_of(name, state), model.start.get(name)
    wanted = wanted_image(model, name, state, probes)
    held = held_against(model, name, state, probes, wanted)
    beside = probes.add(wanted.clone(), state.adapter[name], -scaling)
    ideal = update = scaling * figures.ideal
    if start is not None:
        update = probes.norm(probes.add(wanted, start, -scaling)).value
    narrowed = max(
        probes.norm(multiplied_image(model, name, arithmetic, probes).sub_(wanted)).value
        for arithmetic in model.arithmetics
    )
    return _Measured(
        name,
        scaling,
        ideal=ideal,
        error=_together(figures.error, scaling, held),
        rounding=model.fold_rounding(name),
        truncated=scaling * figures.truncated,
        update=update,
        narrowed=hypot(scaling * figures.error.value, narrowed),
        remainder=0.0 if state.total[name].is_zero else probes.norm(beside).value,
        kept=kept,
    )


def _together(step: Norm, scaling: float, held: Norm) -> Norm:
    """Both halves: independent rounding adds up in squares, what it is at most in full."""
    return Norm(hypot(scaling * step.value, held.value), scaling * step.bound + held.bound)


def _kept(
    model: AdaptedModel, state: GlobalState, forwards: Mapping[Arithmetic, Forward]
) -> Mapping[str, Kept]:
    """What comes out of every module's remainder, in the arithmetic that is furthest from all."""
    found = [measure_kept(model, state.total, forward) for forward in forwards.values()]
    return max(found, key=lambda kept: abs(_pooled(kept.values()).share - 1.0), default={})


def _pooled(kept: Iterable[Kept]) -> Kept:
    return reduce(Kept.plus, kept, Kept())


def _overall(
    model: AdaptedModel,
    measured: Sequence[_Measured],
    modules: tuple[ModuleRecord, ...],
    dense_error: float,
) -> CertificateRecord:
    ideal = hypot(*(m.ideal for m in measured))
    excused = hypot(*(m.rounding + m.truncated for m in measured))
    worst = max(modules, key=lambda m: m.error / m.allowed)
    narrowest = max(modules, key=lambda m: m.forward or 0.0)
    kept = [m.kept for m in measured if m.kept]
    pooled = _pooled(kept)
    return CertificateRecord(
        placement=" and ".join(sorted({model.placement(name) for name in model.modules})),
        error=ratio(hypot(*(m.error.value for m in measured)), ideal),
        bound=ratio(hypot(*(m.error.bound for m in measured)), ideal),
        allowed=TOLERANCE + ratio(excused, ideal),
        truncated=ratio(hypot(*(m.truncated for m in measured)), ideal),
        worst_module=worst.module,
        worst_error=worst.error,
        forward=ratio(hypot(*(m.narrowed for m in measured)), hypot(*(m.update for m in measured))),
        worst_forward_module=narrowest.module,
        worst_forward=narrowest.forward,
        kept=pooled.share if kept else None,
        kept_error=pooled.standard_error if kept else None,
        dense_error=dense_error,
        own=(),
        held=all(m.bound <= m.allowed for m in modules) and dense_error <= TOLERANCE,
    )


def _own_records(
    model: AdaptedModel,
    state: GlobalState,
    specs: Mapping[str, AdapterSpec],
    reduction: Reduction,
    modules: Sequence[ModuleRecord],
) -> tuple[OwnRecord, ...]:
    """The same for every client with an adapter of its own, in the model that it will train.

    Each module is held to what is allowed of it: all together would hide a small one.
    """
    ideal = hypot(*(m.ideal for m in modules))
    allowed = {m.module: m.allowed * m.ideal for m in modules}
    records: dict[str, OwnRecord] = {}
    kept, shared = each_once(state.own)
    for client in kept:
        model.enter(state, client, specs.get(client))
        found = {
            name: _together(
                figures.error, model.spec.modules[name].scaling, held_error(model, name, state)
            )
            for name, figures in reduction.modules.items()
        }
        records[client] = OwnRecord(
            client=client,
            error=ratio(hypot(*(x.value for x in found.values())), ideal),
            bound=ratio(hypot(*(x.bound for x in found.values())), ideal),
            held=all(x.bound <= allowed[name] for name, x in found.items()),
        )
    for client, name in shared.items():  # one adapter, and one way of applying it
        records[client] = records[name].model_copy(update={"client": client})
    if records:
        model.enter(state)
    return tuple(records[client] for client in sorted(records))
