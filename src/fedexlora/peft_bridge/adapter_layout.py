"""Where the tensors of a model's adapter go in PEFT's files: all that writing one takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec
from fedexlora.peft_bridge.adapter_file import StoredModule


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """How PEFT stores what a federation trains; needs neither PEFT nor a model."""

    spec: AdapterSpec
    config: Mapping[str, Any]
    """``adapter_config.json`` of the adapter as it is trained, for inference."""
    names: Mapping[str, str]
    """By name in the file: ours, which is PEFT's with the path in the untouched base."""
    modules: Mapping[str, StoredModule]
    """How the factors of every module are stored."""
    taken_out: Mapping[str, Factors] = field(default_factory=dict)
    """What an initialisation such as PiSSA moved from the original weights to the factors."""

    def stored_factor(self, name: str, letter: str, matrix: Tensor) -> Tensor:
        """A factor ``(r, d_in)`` or ``(d_out, r)`` in the shape of the layer's own parameters."""
        rank = matrix.shape[0] if letter == "A" else matrix.shape[1]
        return matrix.reshape(self.modules[name].stored_shape(letter, rank))


def stored_module(
    name: str, spec: ModuleSpec, *, embedding: bool, kernel: tuple[int, ...]
) -> StoredModule:
    """How a module of these shapes is stored.

    Args:
        name: the layer's path in the base model.
        spec: its shapes, with the kernel flattened.
        embedding: whether it is an Embedding.
        kernel: of a convolution; empty for every other layer.
    """
    channels = spec.d_in // prod(kernel)
    ones = (1,) * len(kernel)
    shapes = {"A": (spec.rank, channels, *kernel), "B": (spec.d_out, spec.rank, *ones)}
    return StoredModule(name, embedding, shapes, spec.scaling)
