"""What an update must contain: the agreement that updates are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One adapted module: its factors are ``A (rank, d_in)`` and ``B (d_out, rank)``."""

    d_out: int
    d_in: int
    rank: int
    dtype: torch.dtype

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

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of an update by its name on the wire."""
        factors = {
            f"{letter}/{name}": module.factor(letter)
            for name, module in self.modules.items()
            for letter in self.trained
        }
        return factors | {f"dense/{name}": spec for name, spec in self.dense.items()}
