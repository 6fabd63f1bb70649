"""A written adapter, read back and held against the global model that it should be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from fedexlora.algebra.deviation import ratio
from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, difference_norm
from fedexlora.errors import ExactnessError
from fedexlora.peft_bridge.adapter_file import AdapterFile, open_adapter
from fedexlora.peft_bridge.names import bias_owner

TOLERANCE = 1e-6
"""Largest accepted error of a module, relative to its update, beside a stated truncation."""


@dataclass(frozen=True, slots=True)
class WrittenError:
    """How far a written adapter is from the model that it should be, where it is farthest."""

    module: str
    error: float
    """|written - wanted| / |wanted| of this module, of whose stated truncation it may consist."""


def check_export(
    folder: Path,
    updates: Mapping[str, LowRank],
    dense: Mapping[str, Tensor],
    stated: Mapping[str, float] | None = None,
) -> WrittenError:
    """Read an adapter's files and compare every module, and every head, in float64.

    Args:
        folder: the written adapter.
        updates: the scaled update ``(d_out, d_in)`` that each module should have, float64.
        dense: heads, and biases times the scaling that they are applied with.
        stated: the truncation that was asked for, by module; none by default.

    Raises:
        ExactnessError: naming every module that is off by more, and what is missing.
    """
    stored = open_adapter(folder)
    heads = {name.replace(".base_layer.", "."): name for name in stored.dense}
    wanted_heads = {name.replace(".base_layer.", "."): tensor for name, tensor in dense.items()}
    faults = [f"{x}: is not written" for x in updates if x not in stored.modules]
    faults += [f"{x}: is not written" for x in wanted_heads if x not in heads]
    faults += [f"{x}: does not belong to the model" for x in stored.modules if x not in updates]
    errors: dict[str, float] = {}
    for name in updates.keys() & stored.modules.keys():
        lost = difference_norm(_update(stored, name), updates[name])
        errors[name] = ratio(lost, sqrt(updates[name].squared_norm()))
    for name in wanted_heads.keys() & heads.keys():
        found, wanted = _head(stored, heads[name]), wanted_heads[name].double()
        errors[name] = ratio(float((found - wanted).norm()), float(wanted.norm()))
    allowed = {name: TOLERANCE + (stated or {}).get(name, 0.0) for name in errors}
    faults += [
        f"{name}: off by {error:.2e} of it, allowed {allowed[name]:.2e}"
        for name, error in sorted(errors.items())
        if not error <= allowed[name]  # NaN is neither
    ]
    if faults:
        raise ExactnessError(f"{folder}: what is written is not the global model", faults)
    worst = max(sorted(errors), key=lambda name: errors[name])
    return WrittenError(worst, errors[worst])


def _update(stored: AdapterFile, name: str) -> LowRank:
    factors = stored.factors(name).to(torch.float64)
    return LowRank(Factors(factors.A, stored.modules[name].scaling * factors.B))


def _head(stored: AdapterFile, name: str) -> Tensor:
    shape = stored.dense[name].shape
    owner = bias_owner(name)
    scale = stored.modules[owner].scaling if owner else 1.0
    return scale * stored.dense_rows(name, 0, shape[0] if shape else 1).double()
