"""Adapters of a live model as folders that ``PeftModel.from_pretrained`` loads on its base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.errors import BridgeError
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.peft_bridge.adapter_layout import AdapterLayout, stored_module
from fedexlora.peft_bridge.export_check import WrittenError
from fedexlora.peft_bridge.global_writer import write_factors, write_global
from fedexlora.peft_bridge.model import DIFFERENCE, REMAINDER, AdaptedModel
from fedexlora.peft_bridge.modules import EmbeddingModule
from fedexlora.peft_bridge.names import PREFIX
from fedexlora.peft_bridge.origin import Origin
from fedexlora.peft_bridge.outline import ModelOutline


def save_global(model: AdaptedModel, state: GlobalState, folder: Path) -> WrittenError:
    """Write a version of a model; see :func:`fedexlora.peft_bridge.global_writer.write_global`."""
    return write_global(layout_of(model), state, folder)


def save_factors(
    model: AdaptedModel,
    factors: Mapping[str, Factors],
    dense: Mapping[str, Tensor],
    folder: Path,
    spec: AdapterSpec | None = None,
) -> None:
    """Write factors of a model; see :func:`fedexlora.peft_bridge.global_writer.write_factors`."""
    write_factors(layout_of(model), factors, dense, folder, spec)


def layout_of(model: AdaptedModel) -> AdapterLayout:
    """How PEFT stores what a model trains.

    Raises:
        BridgeError: as :func:`file_names`.
    """
    modules = {
        name: stored_module(
            name,
            model.spec.modules[name],
            embedding=isinstance(module, EmbeddingModule),
            kernel=tuple(module.parameters()["A"].shape[2:]),
        )
        for name, module in model.modules.items()
    }
    return AdapterLayout(model.spec, _config(model), file_names(model), modules, model.taken_out)


def origin_of(model: AdaptedModel) -> Origin:
    """Where a run begins with a model that is as it was loaded.

    Raises:
        BridgeError: as :func:`file_names`.
    """
    first = model.initial_state()
    base, precision = model.base_fingerprint, model.precision()
    return Origin(layout_of(model), base, precision, first.adapter, first.dense)


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


def _config(model: AdaptedModel) -> dict[str, Any]:
    """What PEFT writes of the model's adapter, for inference."""
    config = copy.deepcopy(model.peft_model.peft_config[model.adapter])
    config.inference_mode = True
    said: dict[str, Any] = config.to_dict()
    return {key: sorted(x) if isinstance(x, set) else x for key, x in said.items()}
