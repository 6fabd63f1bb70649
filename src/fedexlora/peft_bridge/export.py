"""Adapters as folders that ``PeftModel.from_pretrained`` loads on the untouched base."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, stack
from fedexlora.algebra.product import compact
from fedexlora.exchange.state import GlobalState
from fedexlora.peft_bridge.model import AdaptedModel


def save_global(model: AdaptedModel, state: GlobalState, folder: Path) -> None:
    """Write the final global model, adapter and all remainders, as one PEFT adapter.

    On the untouched base its update is ``scaling * (total + B A)``, at the lowest rank that loses
    nothing, with PEFT's scaling set to 1.

    Args:
        model: the model that the state belongs to.
        state: the version to write.
        folder: an existing folder.
    """
    if all(total.is_zero for total in state.total.values()):
        save_factors(model, state.adapter, state.dense, folder)
        return
    whole = {
        name: _whole(state.total[name], state.adapter[name], module.scaling)
        for name, module in model.modules.items()
    }
    _write(model, _unit_scaled(model, whole), whole, state.dense, folder)


def save_factors(
    model: AdaptedModel,
    factors: Mapping[str, Factors],
    dense: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Write factors of the model's own ranks and scalings as a PEFT adapter, as they are."""
    _write(model, _plain(model), factors, dense, folder)


def _whole(total: LowRank, adapter: Factors, scaling: float) -> Factors:
    """``scaling * (total + B A)`` as float32 factors."""
    d_out, d_in = total.shape
    if isinstance(total.value, Factors):
        rows = stack([total.value.to(torch.float64), adapter.to(torch.float64)])
        low = compact(Factors(rows.A, scaling * rows.B)).to(torch.float32)
        # PEFT has no adapter of rank 0; a module without any update gets a zero of rank 1.
        return low if low.rank else Factors(torch.zeros(1, d_in), torch.zeros(d_out, 1))
    matrix = (scaling * (total.dense() + adapter.to(torch.float64).product())).float()
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


def _unit_scaled(model: AdaptedModel, factors: Mapping[str, Factors]) -> LoraConfig:
    """The model's configuration with the ranks of ``factors`` and a scaling of 1 everywhere."""
    ranks = {name: pair.rank for name, pair in factors.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    # "^" makes PEFT take a name for the whole path and not for the end of a longer one.
    other = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
    config = _plain(model)
    config.r, config.lora_alpha, config.use_rslora = common, common, False
    config.rank_pattern, config.alpha_pattern = other, dict(other)
    config.init_lora_weights = True
    return config


def _write(
    model: AdaptedModel,
    config: LoraConfig,
    factors: Mapping[str, Factors],
    dense: Mapping[str, Tensor],
    folder: Path,
) -> None:
    live = get_peft_model_state_dict(
        model.peft_model, adapter_name=model.adapter, save_embedding_layers=False
    )
    prefix = "base_model.model."
    known: dict[str, Tensor] = {f"{prefix}{name}": tensor for name, tensor in dense.items()}
    for name, pair in factors.items():
        known[f"{prefix}{name}.lora_A.weight"] = pair.A
        known[f"{prefix}{name}.lora_B.weight"] = pair.B
    tensors = {}
    for key in live:
        plain_key = key.replace(".base_layer.", ".")
        tensors[key] = known.pop(plain_key).contiguous().cpu()
    if known:
        raise AssertionError(f"PEFT's adapter format has no place for {sorted(known)}")
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
