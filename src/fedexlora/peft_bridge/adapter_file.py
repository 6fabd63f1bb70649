"""A stored PEFT adapter, read from its folder without PEFT and without a model.

Tensors are read one module at a time, so that any number of adapters fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.errors import AdapterError
from fedexlora.exchange.spec import TensorSpec
from fedexlora.exchange.tensors import TensorFile
from fedexlora.peft_bridge.names import (
    EMBEDDING_KEYS,
    FACTOR_BIAS,
    INITIALISED_FROM_DATA,
    MUTATING,
    PREFIX,
    PRODUCT_KEYS,
    UNSUPPORTED,
    rank_and_scaling,
    targets,
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
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


@dataclass(frozen=True, slots=True)
class StoredModule:
    """One adapted layer: its factors as the file stores them, and what PEFT multiplies them by."""

    name: str
    """The layer's path in the base model."""
    embedding: bool
    """Whether it is an Embedding, whose ``B @ A`` is the transpose of its weight's change."""
    shapes: Mapping[str, tuple[int, ...]]
    """``A (r, d_in)`` and ``B (d_out, r)``; a convolution's with their kernels."""
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of ``A``."""
        return self.shapes["A"][0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel of a convolution; empty for every other layer."""
        return self.shapes["A"][2:]

    @property
    def layout(self) -> tuple[bool, int, tuple[int, ...]]:
        """What every adapter of one layer has in common, whatever its rank."""
        return self.embedding, self.shapes["B"][0], self.shapes["A"][1:]

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of ``B @ A``, kernels flattened."""
        d_in = 1
        for size in self.shapes["A"][1:]:
            d_in *= size
        return self.shapes["B"][0], d_in

    def key(self, letter: str) -> str:
        """The name of factor ``"A"`` or ``"B"`` in the file."""
        keys = EMBEDDING_KEYS if self.embedding else PRODUCT_KEYS
        return f"{PREFIX}{self.name}.{keys[letter]}"

    def stored_shape(self, letter: str, rank: int) -> tuple[int, ...]:
        """The shape that a file stores a factor of any rank in."""
        a, b = self.shapes["A"], self.shapes["B"]
        return (rank, *a[1:]) if letter == "A" else (b[0], rank, *b[2:])


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A PEFT adapter's folder whose configuration and tensors agree; no value is read yet."""

    folder: Path
    config: Mapping[str, Any]
    """The content of ``adapter_config.json``."""
    file: TensorFile
    modules: Mapping[str, StoredModule]
    dense: Mapping[str, TensorSpec]
    """Heads, biases and token rows, by their name in the base model."""

    def factors(self, name: str) -> Factors:
        """A module's factors as matrices, unscaled, in the dtype of the file.

        Raises:
            AdapterError: if a value is not finite.
        """
        a, b = self.factor(name, "A"), self.factor(name, "B")
        dtype = torch.promote_types(a.dtype, b.dtype)
        return Factors(a.to(dtype), b.to(dtype))

    def factor(self, name: str, letter: str) -> Tensor:
        """One factor as a matrix, unscaled: ``A (r, d_in)`` or ``B (d_out, r)``.

        Raises:
            AdapterError: if a value is not finite.
        """
        return self._finite(self.modules[name].key(letter)).flatten(1)

    def dense_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a head, bias or token table.

        Raises:
            AdapterError: if a value is not finite.
        """
        key = f"{PREFIX}{name}"
        if not self.dense[name].shape:
            return self._finite(key)
        return self._checked(key, self.file.read_rows(key, start, stop))

    def _finite(self, key: str) -> Tensor:
        return self._checked(key, self.file.read(key))

    def _checked(self, key: str, tensor: Tensor) -> Tensor:
        if not bool(tensor.isfinite().all()):
            raise AdapterError(f"{self.file.path}: {key} holds values that are not finite")
        return tensor


def open_adapter(folder: Path) -> AdapterFile:
    """Read a folder's configuration and the names and shapes of its tensors.

    Raises:
        AdapterError: if it is no whole PEFT LoRA adapter, or not a plain one; lists all faults.
    """
    config = _config(folder)
    if faults := list(_config_faults(config)):
        raise AdapterError(f"{folder / CONFIG}: this adapter is not a plain LoRA", faults)
    path = folder / TENSORS
    if not path.is_file():
        pickled = [name for name in _PICKLED if (folder / name).exists()]
        found = f"; {pickled[0]} is a pickle, which can run code and is never loaded: convert it"
        raise AdapterError(f"{folder}: there is no {TENSORS}{found if pickled else ''}")
    try:
        file = TensorFile.open(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    faults = []
    modules = {
        name: module
        for name, keys in _grouped(file, faults.append).items()
        if (module := _module(name, keys, config, file, faults.append))
    }
    dense = {
        key.removeprefix(PREFIX): spec
        for key, spec in file.tensors.items()
        if ".lora_" not in key or key.endswith(f".{FACTOR_BIAS}")
    }
    faults += [
        f"{name}: expected floating-point values, found {spec}"
        for name, spec in dense.items()
        if not spec.dtype.is_floating_point
    ]
    if not modules and not faults:
        faults.append("it has no LoRA factors")
    if faults:
        raise AdapterError(f"{path}: its tensors and {CONFIG} are not one LoRA adapter", faults)
    return AdapterFile(folder, config, file, modules, dense)


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder")
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected an object, found {type(config).__name__}")
    return config


def _config_faults(config: Mapping[str, Any]) -> Iterator[str]:
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


def _grouped(file: TensorFile, fault: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """Factor keys by module and letter; what is no known tensor of LoRA is a fault."""
    endings = {
        f".{ending}": letter
        for keys in (PRODUCT_KEYS, EMBEDDING_KEYS)
        for letter, ending in keys.items()
    }
    found: dict[str, dict[str, str]] = {}
    for key in file.tensors:
        name = key.removeprefix(PREFIX)
        if name == key:
            fault(f"{key}: expected a name that starts with {PREFIX}")
            continue
        ending = next((x for x in endings if name.endswith(x)), None)
        if ending:
            found.setdefault(name.removesuffix(ending), {})[endings[ending]] = key
        elif "lora_magnitude_vector" in name:
            fault(f"{key}: a magnitude of DoRA, whose updates have no mean that is one of them")
        elif ".lora_" in name and not name.endswith(f".{FACTOR_BIAS}"):
            fault(f"{key}: not a tensor of plain LoRA")
    return found


def _module(
    name: str,
    keys: Mapping[str, str],
    config: Mapping[str, Any],
    file: TensorFile,
    fault: Callable[[str], None],
) -> StoredModule | None:
    if missing := [letter for letter in ("A", "B") if letter not in keys]:
        fault(f"{name}: factor {missing[0]} is missing")
        return None
    specs = {letter: file.tensors[key] for letter, key in keys.items()}
    shapes = {letter: spec.shape for letter, spec in specs.items()}
    a, b = shapes["A"], shapes["B"]
    if len(a) < 2 or len(a) != len(b) or a[0] != b[1] or any(x != 1 for x in b[2:]):
        fault(f"{name}: expected A (r, d_in) and B (d_out, r), found {list(a)} and {list(b)}")
        return None
    if not all(spec.dtype.is_floating_point for spec in specs.values()):
        fault(f"{name}: expected floating-point factors, found {specs['A']} and {specs['B']}")
        return None
    rank, scaling = rank_and_scaling(config, name)
    if rank != a[0]:
        fault(f"{name}: {CONFIG} gives it rank {rank}, its factors have {a[0]}")
    if not targets(config, name):
        fault(f"{name}: target_modules does not cover it, so PEFT would ignore its factors")
    return StoredModule(name, keys["A"].endswith(EMBEDDING_KEYS["A"]), shapes, scaling)
