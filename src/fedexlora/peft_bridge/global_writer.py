"""A version of the global model, or one client's factors, as a PEFT adapter; needs no PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, stack
from fedexlora.algebra.product import compact
from fedexlora.errors import BridgeError
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.peft_bridge.adapter_config import CONFIG, TENSORS
from fedexlora.peft_bridge.adapter_layout import AdapterLayout
from fedexlora.peft_bridge.export_check import Terms, WrittenError, check_export
from fedexlora.peft_bridge.names import PREFIX, bias_owner, shape_settings


def write_global(layout: AdapterLayout, state: GlobalState, folder: Path) -> WrittenError:
    """Write a global model, adapter and all remainders, as one PEFT adapter.

    On the untouched base its update is ``scaling * (total + B A)``, at the lowest rank that loses
    nothing, with PEFT's scaling set to 1. What an initialisation such as PiSSA took out of the
    base is part of it: ``(B - B0) A + B0 (A - A0)`` on the original weights.

    Args:
        layout: of the model that the state belongs to.
        state: the version to write.
        folder: an existing folder.

    Returns:
        The worst module, of what was read back from the written files.

    Raises:
        ExactnessError: if a module or head that was written is not that of the model.
    """
    spec = layout.spec
    terms = partial(_terms, layout, state)
    scaled = {
        # A bias of the factors is multiplied by the scaling.
        name: tensor * spec.modules[owner].scaling if owner else tensor
        for name, tensor in state.dense.items()
        for owner in (bias_owner(name),)
    }
    if all(total.is_zero for total in state.total.values()) and not layout.taken_out:
        write_factors(layout, state.adapter, state.dense, folder)
        return check_export(folder, spec.modules, terms, scaled)
    whole = {
        name: _whole(state.total[name], _since_original(layout, name, pair), module.scaling)
        for name, module in spec.modules.items()
        for pair in (state.adapter[name],)
    }
    ones = dict.fromkeys(whole, 1.0)
    _write(layout, _reshaped(layout, whole, ones), whole, scaled, folder)
    return check_export(folder, spec.modules, terms, scaled)


def write_factors(
    layout: AdapterLayout,
    factors: Mapping[str, Factors],
    dense: Mapping[str, Tensor],
    folder: Path,
    spec: AdapterSpec | None = None,
) -> None:
    """Write factors as a PEFT adapter, as they are.

    Args:
        layout: of the model that they belong to.
        factors: by module, of ``spec``'s ranks.
        dense: heads and biases.
        folder: an existing folder.
        spec: ranks and scalings; by default the model's own.

    Raises:
        BridgeError: if the model's base was changed by the initialisation of its adapter, so that
            the factors alone mean nothing to anyone else.
    """
    if layout.taken_out:
        raise BridgeError(
            "factors on a base that their initialisation changed cannot be stored as adapters",
            ["leave out --keep-updates, or set lora.init_lora_weights = true"],
        )
    config = layout.config
    if spec is not None and spec != layout.spec:
        config = _reshaped(layout, factors, {n: m.scaling for n, m in spec.modules.items()})
    _write(layout, config, factors, dense, folder)


def _terms(layout: AdapterLayout, state: GlobalState, name: str) -> Terms:
    """``scaling * (total + B A)`` on the untouched base."""
    scaling = layout.spec.modules[name].scaling
    yield state.total[name].value, scaling
    yield _since_original(layout, name, state.adapter[name]), scaling


def _since_original(layout: AdapterLayout, name: str, adapter: Factors) -> Factors:
    wide = adapter.to(torch.float64)
    if name not in layout.taken_out:
        return wide
    start = layout.taken_out[name].to(torch.float64)
    # B A - B0 A0 by differences of factors: where those are 0, nothing is left, and no rounding.
    return stack([Factors(wide.A, wide.B - start.B), Factors(wide.A - start.A, start.B)])


def _whole(total: LowRank, adapter: Factors, scaling: float) -> Factors:
    """``scaling * (total + B A)`` as float32 factors."""
    d_out, d_in = total.shape
    if isinstance(total.value, Factors):
        rows = stack([total.value, adapter])
        low = compact(Factors(rows.A, scaling * rows.B)).to(torch.float32)
        # PEFT has no adapter of rank 0; a module without any update gets a zero of rank 1.
        return low.padded(max(low.rank, 1))
    matrix = (scaling * (total.dense() + adapter.product())).float()
    # A full-rank matrix is its own best factor: the other one is the identity, and nothing rounds.
    if d_out <= d_in:
        return Factors(matrix, torch.eye(d_out))
    return Factors(torch.eye(d_in), matrix)


def _reshaped(
    layout: AdapterLayout, factors: Mapping[str, Factors], scalings: Mapping[str, float]
) -> dict[str, Any]:
    """The model's configuration with the ranks of ``factors`` and these scalings."""
    settings = shape_settings({name: pair.rank for name, pair in factors.items()}, scalings)
    return {**layout.config, **settings, "init_lora_weights": True}


def _write(
    layout: AdapterLayout,
    config: Mapping[str, Any],
    factors: Mapping[str, Factors],
    dense: Mapping[str, Tensor],
    folder: Path,
) -> None:
    known: dict[str, Tensor] = {f"{PREFIX}{name}": tensor for name, tensor in dense.items()}
    for name, pair in factors.items():
        for letter, value in (("A", pair.A), ("B", pair.B)):
            stored = layout.stored_factor(name, letter, value)
            known[layout.modules[name].key(letter)] = stored
    tensors = {key: known[ours].contiguous().cpu() for key, ours in layout.names.items()}
    text = json.dumps(dict(config), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
