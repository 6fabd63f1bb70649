"""What PEFT really has: the adapted modules of a live model, or the reasons to refuse it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedexlora.errors import BridgeError
from fedexlora.exchange.spec import ModuleSpec

_PREFIX = "base_model.model."
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One LoRA layer of a live model, with the scaling and orientation that PEFT applies."""

    name: str
    """The layer's path in the base model."""
    layer: LoraLinear
    adapter: str

    @property
    def scaling(self) -> float:
        """What PEFT multiplies ``B @ A`` by: alpha / r, alpha / sqrt(r), or a pattern's."""
        return float(self.layer.scaling[self.adapter])

    @property
    def weight(self) -> Tensor:
        """The frozen weight as stored, ``(d_out, d_in)``, or ``(d_in, d_out)`` for Conv1D."""
        weight: Tensor = self.layer.get_base_layer().weight
        return weight

    @property
    def A(self) -> Tensor:  # noqa: N802 - the paper's letter
        """The live down-projection, ``(r, d_in)``."""
        weight: Tensor = self.layer.lora_A[self.adapter].weight
        return weight

    @property
    def B(self) -> Tensor:  # noqa: N802 - the paper's letter
        """The live up-projection, ``(d_out, r)``."""
        weight: Tensor = self.layer.lora_B[self.adapter].weight
        return weight

    @property
    def spec(self) -> ModuleSpec:
        """Shapes and dtype of the factors."""
        return ModuleSpec(self.B.shape[0], self.A.shape[1], self.A.shape[0], self.A.dtype)

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A ``(d_out, d_in)`` matrix in the orientation of :attr:`weight`, and back again."""
        return matrix.T if self.layer.fan_in_fan_out else matrix


def adapted_modules(model: PeftModel, adapter: str) -> dict[str, AdaptedModule]:
    """Every module that ``adapter`` changes, by its path in the base model.

    Raises:
        BridgeError: naming every module and setting whose aggregation would not be exact, with
            the reason and the way out.
    """
    faults = _config_faults(model.peft_config[adapter])
    shared = _shared_storage(model)
    modules: dict[str, AdaptedModule] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.r:
            continue
        name = path.removeprefix(_PREFIX)
        if fault := _layer_fault(layer, adapter, shared):
            faults.append(f"{name}: {fault}")
        elif isinstance(layer, LoraLinear):
            modules[name] = AdaptedModule(name, layer, adapter)
    if not modules and not faults:
        faults.append("no LoRA module is adapted: lora.target_modules matches nothing")
    if faults:
        raise BridgeError("this model cannot be aggregated exactly", faults)
    return modules


def dense_parameters(model: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """Trained parameters that are not factors: copies of heads, and biases.

    Returns:
        By the parameter's name in the base model.

    Raises:
        BridgeError: if a trained head has buffers, whose mean is not that of the clients' models.
    """
    found: dict[str, nn.Parameter] = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_A." not in path and ".lora_B." not in path:
            found[_dense_name(path, adapter)] = parameter
    buffers = [path for path, _ in model.named_buffers() if f".modules_to_save.{adapter}." in path]
    if buffers:
        raise BridgeError(
            "trained heads with buffers (running statistics) are not supported",
            [f"{path}: choose other lora.modules_to_save" for path in buffers],
        )
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


def _dense_name(path: str, adapter: str) -> str:
    return (
        path.removeprefix(_PREFIX)
        .replace(f".modules_to_save.{adapter}.", ".")
        .replace(".base_layer.", ".")
    )


def _config_faults(config: LoraConfig) -> list[str]:
    faults = []
    if not isinstance(config, LoraConfig):
        return [f"expected a LoRA adapter, found {type(config).__name__}"]
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        faults.append(
            f"lora.init_lora_weights = {init!r} changes the base weights, so that the adapter "
            f"alone is no longer the model; use true, 'gaussian' or 'orthogonal'"
        )
    refused = {
        "target_parameters": "expert weights are not plain products B @ A; use target_modules",
        "trainable_token_indices": "rows of an embedding are not factors; use modules_to_save",
        "layer_replication": "replicated layers share a frozen weight that the remainder changes",
        "megatron_config": "parallel layers are not supported",
    }
    for key, reason in refused.items():
        if getattr(config, key, None):
            faults.append(f"lora.{key}: {reason}")
    if getattr(config, "lora_bias", False):
        faults.append("lora.lora_bias: biases of the factors are not supported; use bias")
    return faults


def _layer_fault(layer: LoraLayer, adapter: str, shared: frozenset[int]) -> str | None:
    """Why the mean of this layer's updates is not the update of a mean, or None."""
    base = layer.get_base_layer()
    if variant := layer.lora_variant.get(adapter):
        kind = type(variant).__name__.removesuffix("LinearVariant")
        return f"{kind} is not a plain product B @ A, so its exact mean is not one; use plain LoRA"
    if type(layer) is not LoraLinear or not isinstance(base, (nn.Linear, Conv1D)):
        return f"layer type {type(base).__name__} is not supported; Linear and Conv1D are"
    if base.weight.dtype != torch.float32:
        dtype = str(base.weight.dtype).removeprefix("torch.")
        return f"folding into a {dtype} weight would lose the remainder; load the base in float32"
    if base.weight.data_ptr() in shared:
        return "its weight is tied to another layer, which the remainder would change too"
    if layer.merged:
        return "an adapter is merged into its weight; unmerge it"
    return None


def _shared_storage(model: nn.Module) -> frozenset[int]:
    """Addresses of weights that more than one parameter name refers to."""
    uses = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    return frozenset(address for address, count in uses.items() if count > 1)
