"""A written adapter, read back and held against the global model that it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedexlora.algebra.deviation import ratio
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.probes import Probes
from fedexlora.errors import ExactnessError
from fedexlora.exchange.seeds import derive_seed
from fedexlora.peft_bridge.adapter_file import AdapterFile, open_adapter
from fedexlora.peft_bridge.names import bias_owner

TOLERANCE = 1e-6
"""Largest accepted error of a module, relative to its update, in a live model and in files; beside
it the rounding of a folded weight and a stated truncation."""
Terms = Iterable[tuple[Factors | Tensor, float]]
"""Matrices ``(M, N)`` and what each is multiplied by in a sum."""


@dataclass(frozen=True, slots=True)
class WrittenError:
    """How far a written adapter is from the model that it should be, where it is farthest."""

    module: str
    error: float
    """|written - wanted| / |wanted| of this module, of whose stated truncation it may consist."""


def check_export(
    folder: Path,
    modules: Iterable[str],
    terms: Callable[[str], Terms],
    dense: Mapping[str, Tensor],
    stated: Mapping[str, float] | None = None,
) -> WrittenError:
    """Read an adapter's files and compare every module, and every head, one after the other.

    Args:
        folder: the written adapter.
        modules: the modules that it should have.
        terms: what a module's scaled update ``(M, N)`` should be the sum of.
        dense: heads, and biases times the scaling that they are applied with.
        stated: the truncation that was asked for, by module; none by default.

    Raises:
        ExactnessError: naming every module that is off by more, and what is missing.
    """
    stored, known = open_adapter(folder), list(modules)
    heads = {name.replace(".base_layer.", "."): name for name in stored.dense}
    wanted_heads = {name.replace(".base_layer.", "."): tensor for name, tensor in dense.items()}
    faults = [f"{x}: is not written" for x in known if x not in stored.modules]
    faults += [f"{x}: is not written" for x in wanted_heads if x not in heads]
    faults += [f"{x}: does not belong to the model" for x in stored.modules if x not in known]
    errors: dict[str, float] = {}
    for name in known:
        if name in stored.modules:
            errors[name], fault = module_error(stored, name, terms(name), (stated or {}).get(name))
            faults += fault
    for name in wanted_heads.keys() & heads.keys():
        found, wanted = _head(stored, heads[name]), wanted_heads[name].double()
        errors[name] = ratio(float((found - wanted).norm()), float(wanted.norm()))
        if not errors[name] <= TOLERANCE:  # NaN is neither
            faults.append(_fault(name, errors[name], TOLERANCE))
    if faults:
        raise ExactnessError(f"{folder}: what is written is not the global model", sorted(faults))
    worst = max(sorted(errors), key=lambda name: errors[name])
    return WrittenError(worst, errors[worst])


def module_error(
    stored: AdapterFile, name: str, terms: Terms, stated: float | None = None
) -> tuple[float, list[str]]:
    """Hold one module of a written adapter against what it should be.

    Args:
        stored: the adapter, as it is read back.
        name: the module.
        terms: what its scaled update should be the sum of.
        stated: the truncation that was asked for, relative to that sum.

    Returns:
        The error relative to the sum, and the fault, if it is more than is allowed.
    """
    factors, scaling = stored.factors(name), stored.modules[name].scaling
    probes = Probes.of(factors.shape, derive_seed(0, 0, name))
    wanted = probes.zeros(factors.shape)
    for matrix, weight in terms:
        probes.add(wanted, matrix, weight)
    whole = probes.norm(wanted).value
    found = probes.norm(probes.add(wanted, factors, -scaling))
    error, most = ratio(found.value, whole), ratio(found.bound, whole)
    allowed = TOLERANCE
    if stated:
        # What is left out on purpose is known, and its estimate by probes may be twice as much.
        allowed, most = TOLERANCE + (1.0 if probes.exact else 2.0) * stated, error
    return error, [] if most <= allowed else [_fault(name, error, allowed)]


def _fault(name: str, error: float, allowed: float) -> str:
    return f"{name}: off by {error:.2e} of it, allowed {allowed:.2e}"


def _head(stored: AdapterFile, name: str) -> Tensor:
    shape = stored.dense[name].shape
    owner = bias_owner(name)
    scale = stored.modules[owner].scaling if owner else 1.0
    return scale * stored.dense_rows(name, 0, shape[0] if shape else 1).double()
