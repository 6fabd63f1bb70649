"""What an update must contain: the agreement that updates are checked against.

Clients may differ in rank and scaling, never in the modules that they adapt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        """The shape and dtype that ``tensor`` has."""
        return TensorSpec(tuple(tensor.shape), tensor.dtype)

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One adapted module: its factors are ``A (rank, d_in)`` and ``B (d_out, rank)``."""

    d_out: int
    d_in: int
    rank: int
    dtype: torch.dtype
    scaling: float
    """What PEFT multiplies ``B @ A`` by: alpha / r, alpha / sqrt(r), or a pattern's."""

    def factor(self, letter: str) -> TensorSpec:
        """The spec of factor ``"A"`` or ``"B"``."""
        shape = (self.rank, self.d_in) if letter == "A" else (self.d_out, self.rank)
        return TensorSpec(shape, self.dtype)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Everything that clients train: factors by module, and dense tensors (heads, biases)."""

    modules: Mapping[str, ModuleSpec]
    dense: Mapping[str, TensorSpec]
    trained: tuple[str, ...]
    """The factors that clients train and send, ``("A", "B")`` or ``("B",)``."""

    def reshaped(self, shapes: Mapping[str, tuple[int, float]]) -> AdapterSpec:
        """The same with another rank and scaling for every module.

        Raises:
            KeyError: if a module is missing.
        """
        modules = {
            name: replace(module, rank=shapes[name][0], scaling=shapes[name][1])
            for name, module in self.modules.items()
        }
        return replace(self, modules=modules)

    def sending(self, trained: tuple[str, ...], *, heads: bool = True) -> AdapterSpec:
        """The same modules, of which an update has no more than this.

        Args:
            trained: the factors that it has.
            heads: whether it has the heads and biases.
        """
        return replace(self, trained=trained, dense=self.dense if heads else {})

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of an update by its name on the wire."""
        factors = {
            f"{letter}/{name}": module.factor(letter)
            for name, module in self.modules.items()
            for letter in self.trained
        }
        return factors | {f"dense/{name}": spec for name, spec in self.dense.items()}
