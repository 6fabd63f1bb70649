"""What PEFT really has: the adapted modules of a live model, or the reasons to refuse it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    MultiheadAttention,
    ParamWrapper,
)
from torch import Tensor, nn

from fedexlora.errors import BridgeError
from fedexlora.peft_bridge.modules import AdaptedModule, EmbeddingModule, ProductModule
from fedexlora.peft_bridge.names import INITIALISED_FROM_DATA, MUTATING, PREFIX, UNSUPPORTED

_CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)


def adapted_modules(model: PeftModel, adapter: str) -> dict[str, AdaptedModule]:
    """Every module that ``adapter`` changes, by its path in the base model.

    Raises:
        BridgeError: naming every module and setting whose aggregation would not be exact, with
            the reason and the way out.
    """
    faults = _config_faults(model, adapter)
    modules: dict[str, AdaptedModule] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.r:
            continue
        name = path.removeprefix(PREFIX)
        if fault := _layer_fault(layer, adapter):
            faults.append(f"{name}: {fault}")
        elif isinstance(layer, Embedding):
            modules[name] = EmbeddingModule(name, layer, adapter)
        else:
            modules[name] = ProductModule(name, layer, adapter)
    if not modules and not faults:
        faults.append("no LoRA module is adapted: lora.target_modules matches nothing")
    if faults:
        raise BridgeError("this model cannot be aggregated exactly", faults)
    return modules


def mutates_base(model: PeftModel, adapter: str) -> bool:
    """Whether attaching the adapter took its initial update out of the frozen weights."""
    init = model.peft_config[adapter].init_lora_weights
    return isinstance(init, str) and init.lower().startswith(MUTATING)


def dense_parameters(model: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """Trained parameters that are not factors: heads, biases, rows of trained tokens.

    Returns:
        By the parameter's name in the base model, or in PEFT's files where the base has none.

    Raises:
        BridgeError: if a trained head has buffers, whose mean is not that of the clients' models,
            or a parameter is too narrow to hold a mean.
    """
    found: dict[str, nn.Parameter] = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and not _is_factor(path):
            found[_dense_name(path, adapter)] = parameter
    faults = [
        f"{path}: it has running statistics; choose other lora.modules_to_save"
        for path, _ in model.named_buffers()
        if f".modules_to_save.{adapter}." in path
    ]
    faults += [
        f"{name}: a {str(p.dtype).removeprefix('torch.')} parameter would round the clients' mean; "
        f"train heads by lora.modules_to_save and biases by lora.lora_bias instead"
        for name, p in found.items()
        if p.dtype not in (torch.float32, torch.float64)
    ]
    if faults:
        raise BridgeError("these trained parameters cannot be averaged exactly", faults)
    return found


def check_new_weights(new: frozenset[str], trained: Iterable[str]) -> None:
    """Refuse a model with new weights that stay as they are.

    Whoever loads the base again gets other random ones, so that the adapter, which does not carry
    them, would no longer be the model that was trained.

    Args:
        new: parameters that the model's files lack.
        trained: the dense parameters that are trained, and so are part of the adapter.

    Raises:
        BridgeError: naming every such parameter and the way out.
    """
    if left := sorted(new - set(trained)):
        modules = sorted({name.rsplit(".", 1)[0] for name in left})
        raise BridgeError(
            "the model's files lack weights that would be random and frozen",
            [*left, f"train them: lora.modules_to_save = {modules}"],
        )


def shared_weights(model: nn.Module) -> frozenset[int]:
    """Places of the weights that more than one parameter name refers to; see :func:`place_of`."""
    uses = Counter(place_of(p) for _, p in model.named_parameters(remove_duplicate=False))
    return frozenset(place for place, count in uses.items() if count > 1)


def place_of(weight: Tensor) -> int:
    """Where a weight's numbers are; of one without numbers, which tensor it is."""
    return weight.data_ptr() or id(weight)


def is_frozen_base(path: str, adapter: str) -> bool:
    """Whether a parameter of the live model belongs to the frozen base."""
    trained_copy = f".modules_to_save.{adapter}." in path or "trainable_tokens_" in path
    # PEFT keeps the module that a head replaces; it takes no part in the model.
    return not (trained_copy or ".original_module." in path or ".lora_" in path)


def base_name(path: str) -> str:
    """A live parameter's name in the base model."""
    return path.removeprefix(PREFIX).replace(".base_layer.", ".")


def _is_factor(path: str) -> bool:
    if path.endswith(".bias"):
        return False
    return any(f".lora_{kind}." in path for kind in ("A", "B", "embedding_A", "embedding_B"))


def _dense_name(path: str, adapter: str) -> str:
    name = base_name(path).replace(f".modules_to_save.{adapter}.", ".")
    return name.replace(f".lora_B.{adapter}.", ".lora_B.").removesuffix(f".{adapter}")


def _config_faults(model: PeftModel, adapter: str) -> list[str]:
    config = model.peft_config[adapter]
    if not isinstance(config, LoraConfig):
        return [f"expected a LoRA adapter, found {type(config).__name__}"]
    faults = [
        f"lora.{key}: {reason}" for key, reason in UNSUPPORTED.items() if getattr(config, key, None)
    ]
    init = config.init_lora_weights
    named = init.lower() if isinstance(init, str) else ""
    if named.startswith(INITIALISED_FROM_DATA):
        faults.append(
            f"lora.init_lora_weights = {init!r} needs data or a quantised copy of its own to start "
            f"from, which clients would have to share; use true, 'gaussian', 'orthogonal', "
            f"'pissa' or 'olora'"
        )
    if named.startswith(MUTATING):
        narrow = {
            str(p.dtype).removeprefix("torch.")
            for path, p in model.named_parameters()
            if ".base_layer.weight" in path and p.dtype != torch.float32
        }
        faults += [
            f"lora.init_lora_weights = {init!r} changes the base weights and would round them in "
            f"{dtype}; load the base in float32"
            for dtype in sorted(narrow)
        ]
    return faults


def _layer_fault(layer: LoraLayer, adapter: str) -> str | None:
    """Why the mean of this layer's updates is not the update of a mean, or None."""
    base = layer.get_base_layer()
    if variant := layer.lora_variant.get(adapter):
        kind = type(variant).__name__.removesuffix("Variant").removesuffix("Linear")
        return (
            f"{kind} is not a plain product B @ A (DoRA's magnitudes divide by the norm of the "
            f"sum), so the mean of updates is not one of its updates; use plain LoRA"
        )
    if layer.merged:
        return "an adapter is merged into its weight; unmerge it"
    if isinstance(layer, ParamWrapper):
        return "expert weights are not plain products B @ A; use lora.target_modules"
    if isinstance(layer, MultiheadAttention):
        return "PEFT merges attention weights in every forward pass; adapt its projections"
    if isinstance(layer, _CONVOLUTIONS):
        return _convolution_fault(base)
    if isinstance(layer, Embedding):
        return None if base.max_norm is None else "max_norm rewrites the weight in every pass"
    if isinstance(layer, Linear) or type(layer).__name__ in ("Linear8bitLt", "Linear4bit"):
        return None
    return f"{type(layer).__name__} of {type(base).__name__} is not supported"


def _convolution_fault(base: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    plain = {"groups": 1, "padding_mode": "zeros"}
    for key, value in plain.items():
        if getattr(base, key) != value:
            return f"convolutions with {key} = {getattr(base, key)!r} are not plain products B @ A"
    if any(step != 1 for step in base.dilation):
        return f"PEFT ignores dilation = {base.dilation} of convolutions"
    return None
