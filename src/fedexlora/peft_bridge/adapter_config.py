"""The settings of a stored adapter: where they are, and what in them is no plain LoRA."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedexlora.errors import AdapterError
from fedexlora.peft_bridge.names import INITIALISED_FROM_DATA, MUTATING, UNSUPPORTED

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_CONVERSION = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "save_file({k: v.clone() for k, v in torch.load(sys.argv[1], map_location='cpu', "
    "weights_only=True).items()}, sys.argv[2], metadata={'format': 'pt'})\""
)
"""Without ``weights_only``, a pickle could run anything."""
_SHOWN = 5
_EITHER_HEAD = ("classifier", "score")
_UNDERSTOOD = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "use_rslora",
    }
)
"""Settings whose meaning for the update is known; any other one has to be off."""


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter's folder.

    Raises:
        AdapterError: if there are none; names the adapters in the folders below, if there are any.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder")
    path = folder / CONFIG
    if not path.exists() and (below := _adapters_below(folder)):
        raise AdapterError(
            f"{folder}: there is no {CONFIG} here, but in {', '.join(map(str, below))}: "
            f"name that folder"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected an object, found {type(config).__name__}")
    return config


def _adapters_below(folder: Path) -> list[Path]:
    """Adapters in the folders below, the nearest first."""
    found = [path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{CONFIG}")]
    return sorted(found, key=lambda path: (len(path.parts), path))[:_SHOWN]


def pickle_hint(folder: Path) -> str:
    """The command that converts a pickle without running what is in it."""
    found = next((name for name in _PICKLED if (folder / name).exists()), None)
    if found is None:
        return ""
    names = f"{shlex.quote(str(folder / found))} {shlex.quote(str(folder / TENSORS))}"
    return (
        f"; {found} is a pickle, which can run code and is never loaded. This converts it, and "
        f"reads nothing but tensors: {_CONVERSION} {names}"
    )


def head_faults(config: Mapping[str, Any], dense: Iterable[str]) -> Iterator[str]:
    """Modules that PEFT would look for in the file, and not find."""
    stored = [f".{name}" for name in dense]
    for head in config.get("modules_to_save") or ():
        # PEFT adds both names to every classifier, whichever it has.
        if head not in _EITHER_HEAD and not any(f".{head}." in name for name in stored):
            yield f"modules_to_save names {head!r}, of which nothing is stored: PEFT cannot load it"


def config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Why an adapter of these settings is no plain LoRA, one line each."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type: expected LORA, found {config.get('peft_type')!r}"
        return
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            yield f"{key}: expected a positive number, found {value!r}"
    for key in ("rank_pattern", "alpha_pattern"):
        values = config.get(key) or {}
        if not isinstance(values, dict) or not all(
            isinstance(x, int | float) and x > 0 for x in values.values()
        ):
            yield f"{key}: expected positive numbers by pattern, found {values!r}"
    if config.get("use_dora"):
        yield (
            "use_dora: DoRA's magnitudes divide by the norm of the sum, so the mean of updates is "
            "not one of its updates"
        )
    for key, reason in UNSUPPORTED.items():
        if config.get(key):
            yield f"{key}: {reason}"
    for key in sorted(config.keys() - _UNDERSTOOD - UNSUPPORTED.keys() - {"use_dora"}):
        if config[key]:
            yield f"{key} = {config[key]!r}: it is not known to leave the update a product B @ A"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_bound_to_another_base()):
        yield (
            f"init_lora_weights = {init!r} changed the base weights: save it with "
            f"path_initial_model_for_weight_conversion, as an adapter of the original base"
        )


def _bound_to_another_base() -> tuple[str, ...]:
    # EVA alone uses data without changing the base.
    return tuple(x for x in (*MUTATING, *INITIALISED_FROM_DATA) if x != "eva")
