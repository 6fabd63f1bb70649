"""What a stored adapter makes of the tensors of its base, in the layout of the base's files.

A changed weight is ``W + scaling * B @ A``, or its transpose where the layer stores it so; a bias
of the factors adds ``scaling * bias``; a trained head or bias takes the place of the base's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedexlora.algebra.factors import Factors
from fedexlora.peft_bridge.adapter_file import AdapterFile, StoredModule
from fedexlora.peft_bridge.names import FACTOR_BIAS, bias_owner
from fedexlora.peft_bridge.skeleton import Skeleton

_TRANSPOSED = (Conv1D, nn.Embedding)
"""Layers that store ``(d_in, d_out)``."""
_SHOWN = 5
_DIRECT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one parameter."""

    replaced: str | None = None
    """The adapter's dense tensor that takes its place."""
    module: str | None = None
    """The adapted layer whose product is added."""
    transposed: bool = False
    """Whether the layer stores the transpose of ``B @ A``."""
    bias: str | None = None
    """The adapter's bias of factors that is added, scaled."""

    @property
    def whole(self) -> bool:
        """Whether nothing of the base remains."""
        return self.replaced is not None and self.module is None and self.bias is None


def wanted_changes(adapter: AdapterFile, skeleton: Skeleton) -> tuple[dict[str, Change], list[str]]:
    """What the adapter changes, by parameter, and why some of it cannot be merged."""
    changes: dict[str, Change] = {}
    faults: list[str] = []
    absent = [name for name in adapter.modules if skeleton.layer(name) is None]
    if absent:
        more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        names = ", ".join(absent[:_SHOWN])
        faults.append(f"{names}{more}: {skeleton.class_name} has no such layer")
    for module in adapter.modules.values():
        layer = skeleton.layer(module.name)
        if layer is None:
            continue
        if fault := _layer_fault(module, layer, skeleton):
            faults.append(fault)
        else:
            transposed = isinstance(layer, _TRANSPOSED)
            changes[f"{module.name}.weight"] = Change(module=module.name, transposed=transposed)
    for name, spec in adapter.dense.items():
        if "trainable_tokens" in name:
            faults.append(f"{name}: trained rows of tokens have no place here; use the adapter")
            continue
        parameter, change = _dense_change(name, changes)
        shape = skeleton.shapes.get(parameter)
        if shape is None:
            known = f"{skeleton.class_name} has no parameter {parameter}"
            why = "a trained bias of the factors needs one" if change.bias else "nothing takes it"
            faults.append(f"{name}: {known}; {why}")
        elif shape != spec.shape:
            faults.append(f"{name}: expected {list(shape)}, found {list(spec.shape)}")
        else:
            changes[parameter] = change
    faults += [
        f"{name} is one tensor with {', '.join(skeleton.shared[name])}: the adapter changes it in "
        f"one place only, which no merged weight can; the adapter form is exact"
        for name in changes
        if name in skeleton.shared
    ]
    return changes, faults


def _dense_change(name: str, changes: dict[str, Change]) -> tuple[str, Change]:
    """The parameter that a dense tensor belongs to, and what becomes of it."""
    if name.endswith(f".{FACTOR_BIAS}"):
        parameter = f"{name.removesuffix(FACTOR_BIAS)}bias"
        return parameter, replace(changes.get(parameter, Change()), bias=name)
    parameter = name.replace(".base_layer.", ".")
    return parameter, replace(changes.get(parameter, Change()), replaced=name)


def _layer_fault(module: StoredModule, layer: nn.Module, skeleton: Skeleton) -> str | None:
    name = module.name
    if not isinstance(layer, _TRANSPOSED + _DIRECT):
        return (
            f"{name}: expected a Linear, Conv1D, Embedding or convolution, "
            f"found {type(layer).__name__}"
        )
    if module.embedding != isinstance(layer, nn.Embedding):
        kind = "an embedding" if module.embedding else "no embedding"
        return f"{name}: the factors are those of {kind}, the layer is {type(layer).__name__}"
    d_out, d_in = module.shapes["B"][0], module.shapes["A"][1]
    matrix = (d_in, d_out) if isinstance(layer, _TRANSPOSED) else (d_out, d_in)
    expected = (*matrix, *module.kernel)
    found = skeleton.shapes[f"{name}.weight"]
    if found != expected:
        return f"{name}: the factors are for a weight {list(expected)}, the base's is {list(found)}"
    return None


@dataclass(frozen=True, slots=True)
class ChangedTensor:
    """Computes one changed parameter from the base's, in float64 and by groups of rows."""

    adapter: AdapterFile
    change: Change
    factors: Factors | None
    """Of the product that is added, float64."""

    @staticmethod
    def of(adapter: AdapterFile, change: Change) -> ChangedTensor:
        """Read what is needed for all rows.

        Raises:
            AdapterError: if a factor is not finite.
        """
        name = change.module
        factors = adapter.factors(name).to(torch.float64) if name else None
        return ChangedTensor(adapter, change, factors)

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` as they should be, float64, in the shape of ``base``.

        Args:
            base: the same rows of the base's parameter.
            start: the first row, in the layout of the base.
            stop: the row after the last.

        Raises:
            AdapterError: if a value of the adapter is not finite.
        """
        change, adapter = self.change, self.adapter
        total = base.double()
        if change.replaced:
            total = adapter.dense_rows(change.replaced, start, stop).double()
        if change.module and self.factors:
            part = self._product(start, stop).reshape(total.shape)
            total = total.add(part, alpha=adapter.modules[change.module].scaling)
        if change.bias and (owner := bias_owner(change.bias)):
            bias = adapter.dense_rows(change.bias, start, stop).double()
            total = total.add(bias, alpha=adapter.modules[owner].scaling)
        return total

    def _product(self, start: int, stop: int) -> Tensor:
        """Rows of ``B @ A``, or of its transpose."""
        if self.factors is None:
            raise AssertionError("nothing is added")
        a, b = self.factors.A, self.factors.B
        return a[:, start:stop].T @ b.T if self.change.transposed else b[start:stop] @ a
