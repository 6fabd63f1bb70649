"""Base models, and LoRA attached to them."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    set_seed,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from fedexlora.errors import BridgeError
from fedexlora.peft_bridge.adapter_config import TENSORS
from fedexlora.peft_bridge.arithmetic import Width
from fedexlora.peft_bridge.inspect import base_name
from fedexlora.peft_bridge.options import option_faults
from fedexlora.peft_bridge.source import refuse_adapter

Quantization = Literal["int8", "nf4", "fp4"]

HEADS = {"SEQ_CLS": AutoModelForSequenceClassification, "CAUSAL_LM": AutoModelForCausalLM}
"""The models of PEFT's tasks."""
_UNQUANTISED = ("classifier", "score", "lm_head")
_ADAPTABLE = (
    torch.nn.Linear,
    Conv1D,
    torch.nn.Embedding,
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
)
_GIVEN_ELSEWHERE = {
    "task_type": "it follows from task.kind",
    "peft_type": "it is always LORA",
    "inference_mode": "it is set on export",
    "base_model_name_or_path": "it is model.source",
    "revision": "it is model.revision",
}

_TYPES: Mapping[str, Any] = {
    "lora_alpha": float,
    "init_lora_weights": bool | str,  # names with a number in them too
}
"""What ``LoraConfig`` takes where its annotations say otherwise."""


def load_base(
    source: str,
    revision: str | None,
    task_type: str,
    config: Mapping[str, Any],
    seed: int,
    *,
    dtype: Width = "float32",
    quantization: Quantization | None = None,
    unquantised: Iterable[str] = (),
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, frozenset[str]]:
    """A pre-trained model with a head for the task.

    Args:
        source: a folder or hub name, as :func:`resolve_source` returns it.
        revision: a hub revision; None for the default.
        task_type: PEFT's name of the task, ``SEQ_CLS`` or ``CAUSAL_LM``.
        dtype: of the weights, and of the arithmetic where they are quantised.
        quantization: store the linear layers in bitsandbytes' 8 or 4 bits.
        unquantised: modules that are trained whole, and so are not quantised; heads never are.
        config: changes to the model's own configuration (labels, padding token).
        device: where quantised weights are; others are loaded on the processor. The processor by
            default.
        seed: for weights that the files lack, such as a new head.

    Returns:
        The model, and the names of the parameters that its files lack and that are new.

    Raises:
        BridgeError: if there is no such model, or bitsandbytes is needed and not installed.
    """
    if found := find_adapter_config_file(source, revision=revision):
        refuse_adapter(source, Path(found).parent)
    width: torch.dtype = getattr(torch, dtype)
    options = dict(config)
    if quantization:
        check_bitsandbytes(quantization)
        fields = quantization_fields(quantization, dtype, unquantised)
        options["quantization_config"] = BitsAndBytesConfig(**fields)
        options["device_map"] = {"": str(device or "cpu")}
    set_seed(seed)
    try:
        model, report = HEADS[task_type].from_pretrained(
            source, revision=revision, dtype=width, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise BridgeError(f"model.source {source!r} cannot be loaded: {error}") from error
    for module in model.modules():
        # On processors with AVX512-BF16, bitsandbytes repacks a 4-bit weight in the first forward
        # pass without gradients, and then no longer trains through it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, frozenset(report["missing_keys"])


def quantization_fields(
    quantization: Quantization, dtype: Width, unquantised: Iterable[str] = ()
) -> dict[str, Any]:
    """What ``BitsAndBytesConfig`` is told of a base; arguments as of :func:`load_base`."""
    # transformers looks for these at the start of a module's name, PEFT at its end.
    whole = [rf"(.*\.)?{re.escape(name)}" for name in (*_UNQUANTISED, *unquantised)]
    if quantization == "int8":
        return {"load_in_8bit": True, "llm_int8_skip_modules": whole}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quantization,
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_skip_modules": whole,
    }


def check_bitsandbytes(quantization: Quantization) -> None:
    """Refuse to quantise where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BridgeError(
            f"model.quantization = {quantization!r} needs the package bitsandbytes",
            ["pip install 'fedexlora[quantization]'"],
        )


def lora_faults(options: Mapping[str, Any], table: str = "lora") -> list[str]:
    """Every fault of a recipe's ``[lora]`` table: unknown keys, with the nearest that PEFT has."""
    return option_faults(
        table, options, LoraConfig, _GIVEN_ELSEWHERE, lambda: _config(options), types=_TYPES
    )


def _config(options: Mapping[str, Any], **more: str) -> LoraConfig:
    # A copy, as PEFT appends the task's own heads to the list that it is given.
    return LoraConfig(**copy.deepcopy(dict(options)), **more)


def attach_lora(
    base: PreTrainedModel, options: Mapping[str, Any], task_type: str, seed: int
) -> PeftModel:
    """``base`` with a fresh adapter, the same for the same seed.

    Args:
        base: the model; changed in place, as PEFT does.
        options: fields of PEFT's ``LoraConfig``.
        task_type: PEFT's name of the task.
        seed: of the new factors.

    Raises:
        BridgeError: naming every module of the options that does not exist, and those that do.
    """
    config = _config(options, task_type=task_type)
    names = [name for name, _ in base.named_modules()]
    faults = [
        f"lora.{key}: no module of this model is named {wanted!r}"
        for key in ("target_modules", "modules_to_save")
        for wanted in _listed(options.get(key))
        if not any(f".{name}".endswith(f".{wanted}") for name in names)
    ]
    faults += [
        f"lora.{key}: {pattern!r} matches no module of this model"
        for key in ("rank_pattern", "alpha_pattern")
        for pattern in options.get(key, {})
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
    ]
    if faults:
        raise BridgeError("the [lora] table does not fit the model", [*faults, _layers(base)])
    set_seed(seed)
    try:
        model: PeftModel = get_peft_model(base, config)
    except (ValueError, TypeError) as error:
        given = f"lora.target_modules = {options.get('target_modules')!r}"
        raise BridgeError(f"{given}: {error}", [_layers(base)]) from error
    return model


def with_adapter(base: torch.nn.Module, folder: Path) -> PeftModel:
    """An untouched base with a stored adapter, as its users load it.

    Raises:
        BridgeError: if there are no tensors, or the adapter is one of another model.
    """
    tensors = folder / TENSORS
    if not tensors.is_file():
        raise BridgeError(f"{folder}: expected {TENSORS}, found none")
    try:
        model: PeftModel = PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        raise BridgeError(f"{folder}: this adapter does not fit the model: {error}") from error
    with safe_open(tensors, framework="pt") as file:
        stored = set(file.keys())
    held = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    # Beside its factors an adapter may hold embeddings of the base, which PEFT stores with them.
    unknown = {key for key in stored - held if ".lora_" in key}
    if left := sorted(unknown) + sorted(held - stored):
        raise BridgeError(f"{folder}: tensors that the model and the adapter do not share", left)
    return model


def load_merged(folder: Path, task_type: str, dtype: Width) -> PreTrainedModel:
    """A merged model from its folder."""
    model: PreTrainedModel = HEADS[task_type].from_pretrained(
        str(folder), dtype=getattr(torch, dtype)
    )
    return model


def probe_shapes(
    base: PreTrainedModel, options: Mapping[str, Any], task_type: str
) -> dict[str, tuple[int, float]]:
    """Rank and scaling that PEFT gives every module for these options; ``base`` stays as it is.

    Raises:
        BridgeError: as :func:`attach_lora`.
    """
    # An initialisation may change the weights, or take long; shapes do not depend on it.
    plain = {**options, "init_lora_weights": True, "modules_to_save": None, "bias": "none"}
    probed = attach_lora(base, plain, task_type, seed=0)
    found = {
        base_name(path): (layer.r["default"], float(layer.scaling["default"]))
        for path, layer in probed.named_modules()
        if isinstance(layer, LoraLayer)
    }
    probed.unload()
    for parameter in base.parameters():
        parameter.requires_grad_(requires_grad=parameter.dtype.is_floating_point)
    return found


def _listed(names: str | Iterable[str] | None) -> list[str]:
    """The names of a list of modules; a single string is a pattern of PEFT's, or a keyword."""
    return [] if names is None or isinstance(names, str) else list(names)


def _layers(base: PreTrainedModel) -> str:
    """The layers that could be adapted, by the last part of their names."""
    found = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, _ADAPTABLE)
    }
    return f"layers that can be adapted: {', '.join(sorted(found))}"
