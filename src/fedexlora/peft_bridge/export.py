"""Adapters as folders that ``PeftModel.from_pretrained`` loads on the untouched base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, stack
from fedexlora.algebra.product import compact
from fedexlora.errors import BridgeError
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.peft_bridge.export_check import Terms, WrittenError, check_export
from fedexlora.peft_bridge.model import DIFFERENCE, REMAINDER, AdaptedModel
from fedexlora.peft_bridge.names import PREFIX, bias_owner, shape_settings
from fedexlora.peft_bridge.outline import ModelOutline


def save_global(model: AdaptedModel, state: GlobalState, folder: Path) -> WrittenError:
    """Write the final global model, adapter and all remainders, as one PEFT adapter.

    On the untouched base its update is ``scaling * (total + B A)``, at the lowest rank that loses
    nothing, with PEFT's scaling set to 1. What an initialisation such as PiSSA took out of the
    base is part of it: ``[B | -B0] [A ; A0]`` on the original weights.

    Args:
        model: the model that the state belongs to.
        state: the version to write.
        folder: an existing folder.

    Returns:
        The worst module, of what was read back from the written files.

    Raises:
        ExactnessError: if a module or head that was written is not that of the model.
    """
    terms = partial(_terms, model, state)
    scaled = {
        # A bias of the factors is multiplied by the scaling.
        name: tensor * model.spec.modules[owner].scaling if owner else tensor
        for name, tensor in state.dense.items()
        for owner in (bias_owner(name),)
    }
    if all(total.is_zero for total in state.total.values()) and not model.taken_out:
        save_factors(model, state.adapter, state.dense, folder)
        return check_export(folder, model.spec.modules, terms, scaled)
    whole = {
        name: _whole(state.total[name], _since_original(model, name, pair), spec.scaling)
        for name, spec in model.spec.modules.items()
        for pair in (state.adapter[name],)
    }
    ones = dict.fromkeys(whole, 1.0)
    _write(model, _config(model, whole, ones), whole, scaled, folder)
    return check_export(folder, model.spec.modules, terms, scaled)


def save_factors(
    model: AdaptedModel,
    factors: Mapping[str, Factors],
    dense: Mapping[str, Tensor],
    folder: Path,
    spec: AdapterSpec | None = None,
) -> None:
    """Write factors as a PEFT adapter, as they are.

    Args:
        model: the model that they belong to.
        factors: by module, of ``spec``'s ranks.
        dense: heads and biases.
        folder: an existing folder.
        spec: ranks and scalings; by default the model's own.

    Raises:
        BridgeError: if the model's base was changed by the initialisation of its adapter, so that
            the factors alone mean nothing to anyone else.
    """
    if model.taken_out:
        raise BridgeError(
            "factors on a base that their initialisation changed cannot be stored as adapters",
            ["leave out --keep-updates, or set lora.init_lora_weights = true"],
        )
    if spec is None or spec == model.spec:
        config = _plain(model)
    else:
        config = _config(model, factors, {n: m.scaling for n, m in spec.modules.items()})
    _write(model, config, factors, dense, folder)


def file_names(model: ModelOutline) -> dict[str, str]:
    """The names of PEFT's adapter file for the model, and for each our own.

    Raises:
        BridgeError: if PEFT's format has no place for something that is trained, or a place for
            something that is not, so that the adapter would not be the model.
    """
    live = get_peft_model_state_dict(
        model.peft_model, adapter_name=model.adapter, save_embedding_layers=False
    )
    ours = {f"{PREFIX}{name}" for name in model.spec.dense}
    ours |= {f"{PREFIX}{n}.{key}" for n, m in model.modules.items() for key in m.keys().values()}
    # PEFT lists all adapters of a layer, whatever its configurations say, and with `bias = "all"`
    # the biases of trained heads also under the names of their wrappers.
    twice = {REMAINDER, DIFFERENCE, "original_module", "modules_to_save"}
    names = {key: key.replace(".base_layer.", ".") for key in live if not twice & {*key.split(".")}}
    faults = [f"{name}: not in PEFT's adapter file" for name in ours - set(names.values())]
    faults += [f"{key}: in PEFT's file, not trained" for key, x in names.items() if x not in ours]
    if faults:
        raise BridgeError("no PEFT adapter holds what [lora] trains", sorted(faults))
    return names


def _terms(model: AdaptedModel, state: GlobalState, name: str) -> Terms:
    """``scaling * (total + B A)`` on the untouched base."""
    scaling = model.spec.modules[name].scaling
    yield state.total[name].value, scaling
    yield _since_original(model, name, state.adapter[name]), scaling


def _since_original(model: AdaptedModel, name: str, adapter: Factors) -> Factors:
    wide = adapter.to(torch.float64)
    if name not in model.taken_out:
        return wide
    start = model.taken_out[name].to(torch.float64)
    return stack([wide, start.scaled(-1.0)])


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


def _plain(model: AdaptedModel) -> LoraConfig:
    config = copy.deepcopy(model.peft_model.peft_config[model.adapter])
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    return config


def _config(
    model: AdaptedModel, factors: Mapping[str, Factors], scalings: Mapping[str, float]
) -> LoraConfig:
    """The model's configuration with the ranks of ``factors`` and these scalings."""
    config = _plain(model)
    settings = shape_settings({name: pair.rank for name, pair in factors.items()}, scalings)
    for key, value in settings.items():
        setattr(config, key, value)
    config.init_lora_weights = True
    return config


def _write(
    model: AdaptedModel,
    config: LoraConfig,
    factors: Mapping[str, Factors],
    dense: Mapping[str, Tensor],
    folder: Path,
) -> None:
    known: dict[str, Tensor] = {f"{PREFIX}{name}": tensor for name, tensor in dense.items()}
    for name, pair in factors.items():
        module = model.modules[name]
        for letter, key in module.keys().items():
            value = pair.A if letter == "A" else pair.B
            known[f"{PREFIX}{name}.{key}"] = module.stored_factor(letter, value)
    tensors = {key: known[ours].contiguous().cpu() for key, ours in file_names(model).items()}
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
