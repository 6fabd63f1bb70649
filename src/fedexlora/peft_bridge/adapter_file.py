"""A stored PEFT adapter, read from its folder without PEFT and without a model.

Tensors are read one module at a time, so that any number of adapters fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.errors import AdapterError
from fedexlora.exchange.spec import TensorSpec
from fedexlora.exchange.tensors import TensorFile
from fedexlora.peft_bridge.adapter_config import (
    CONFIG,
    TENSORS,
    config_faults,
    head_faults,
    pickle_hint,
    read_config,
)
from fedexlora.peft_bridge.names import (
    EMBEDDING_KEYS,
    FACTOR_BIAS,
    PREFIX,
    PRODUCT_KEYS,
    rank_and_scaling,
    targets,
)
from fedexlora.peft_bridge.stored_names import stored_names


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
    keys: Mapping[str, str]
    """The name in the file of every tensor, by its name as PEFT stores it."""
    notes: tuple[str, ...] = ()
    """What was done to names that PEFT would not have matched."""

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
        return self._checked(key, self.file.read_rows(self.keys[key], start, stop))

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows of any tensor by its stored name, as they are; one without rows is read whole."""
        found = self.keys[key]
        if not self.file.tensors[found].shape:
            return self.file.read(found)
        return self.file.read_rows(found, start, stop)

    def moved(self, path: Path) -> AdapterFile:
        """The same adapter with its tensors in a file of another name."""
        return replace(self, file=replace(self.file, path=path))

    def renamed(self, modules: Mapping[str, str], dense: Mapping[str, str]) -> AdapterFile:
        """The same adapter with other names of layers.

        Args:
            modules: new names, by those that change.
            dense: new names of heads and biases, by all old ones.
        """
        found = {
            modules.get(name, name): replace(module, name=modules.get(name, name))
            for name, module in self.modules.items()
        }
        keys = {f"{PREFIX}{new}": self.keys[f"{PREFIX}{old}"] for old, new in dense.items()}
        for name, module in self.modules.items():
            new = found[modules.get(name, name)]
            keys |= {new.key(letter): self.keys[module.key(letter)] for letter in ("A", "B")}
        whole = {"target_modules": sorted(found), "exclude_modules": None}
        config = {**self.config, **whole, "layers_to_transform": None, "layers_pattern": None}
        old, new_name = next(iter(modules.items()))
        note = f"took {old} for {new_name}, and so on, in {len(modules)} names of layers"
        specs = {new: self.dense[name] for name, new in dense.items()}
        return replace(
            self, config=config, modules=found, dense=specs, keys=keys, notes=(*self.notes, note)
        )

    def _finite(self, key: str) -> Tensor:
        return self._checked(key, self.file.read(self.keys[key]))

    def _checked(self, key: str, tensor: Tensor) -> Tensor:
        if not bool(tensor.isfinite().all()):
            raise AdapterError(f"{self.file.path}: {key} holds values that are not finite")
        return tensor


def open_adapter(folder: Path) -> AdapterFile:
    """Read a folder's configuration and the names and shapes of its tensors.

    Raises:
        AdapterError: if it is no whole PEFT LoRA adapter, or not a plain one; lists all faults.
    """
    config = read_config(folder)
    if faults := list(config_faults(config)):
        raise AdapterError(f"{folder / CONFIG}: this adapter is not a plain LoRA", faults)
    path = folder / TENSORS
    if not path.is_file():
        raise AdapterError(f"{folder}: there is no {TENSORS}{pickle_hint(folder)}")
    try:
        file = TensorFile.open(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    names = stored_names(file.tensors)
    faults = list(names.faults)
    tensors = {name: file.tensors[key] for name, key in names.keys.items()}
    modules = {
        name: module
        for name, keys in _grouped(tensors, faults.append).items()
        if (module := _module(name, keys, config, tensors, faults.append))
    }
    dense = {
        key.removeprefix(PREFIX): spec
        for key, spec in tensors.items()
        if ".lora_" not in key or key.endswith(f".{FACTOR_BIAS}")
    }
    faults += head_faults(config, dense)
    faults += [
        f"{name}: expected floating-point values, found {spec}"
        for name, spec in dense.items()
        if not spec.dtype.is_floating_point
    ]
    if not modules and not faults:
        faults.append("it has no LoRA factors")
    if faults:
        raise AdapterError(f"{path}: its tensors and {CONFIG} are not one LoRA adapter", faults)
    return AdapterFile(folder, config, file, modules, dense, names.keys, tuple(names.notes))


def _grouped(tensors: Iterable[str], fault: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """Factor keys by module and letter; what is no known tensor of LoRA is a fault."""
    endings = {
        f".{ending}": letter
        for keys in (PRODUCT_KEYS, EMBEDDING_KEYS)
        for letter, ending in keys.items()
    }
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        name = key.removeprefix(PREFIX)
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
    tensors: Mapping[str, TensorSpec],
    fault: Callable[[str], None],
) -> StoredModule | None:
    if missing := [letter for letter in ("A", "B") if letter not in keys]:
        fault(f"{name}: factor {missing[0]} is missing")
        return None
    specs = {letter: tensors[key] for letter, key in keys.items()}
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
