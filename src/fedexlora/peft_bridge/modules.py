"""One adapted layer of a live model, whatever its kind, as the algebra sees it.

Every kind of layer is a matrix ``(d_out, d_in)`` here: a convolution's kernel is flattened into
``d_in = in_channels * kernel size``; an embedding maps ``d_in = vocabulary`` to ``d_out``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.spec import ModuleSpec
from fedexlora.peft_bridge.names import EMBEDDING_KEYS, PRODUCT_KEYS
from fedexlora.peft_bridge.wide_sum import WideSum


@dataclass(frozen=True, slots=True)
class AdaptedModule(ABC):
    """One LoRA layer of a live model, with the scaling and orientation that PEFT applies."""

    name: str
    """The layer's path in the base model."""
    layer: LoraLayer
    adapter: str
    wide_sums: list[WideSum] = field(default_factory=list, compare=False)
    """The one of the layer while something rides beside its weight."""

    @property
    def scaling(self) -> float:
        """What PEFT multiplies ``B @ A`` by: alpha / r, alpha / sqrt(r), or a pattern's."""
        return float(self.layer.scaling[self.adapter])

    @property
    def base(self) -> nn.Module:
        """The frozen layer."""
        base: nn.Module = self.layer.get_base_layer()
        return base

    @property
    def weight(self) -> Tensor:
        """The frozen weight as it is stored, quantised or not."""
        weight: Tensor = self.base.weight  # type: ignore[assignment] # torch types it as anything
        return weight

    @property
    def spec(self) -> ModuleSpec:
        """Shapes, dtype and scaling of the live factors."""
        live = self.factors()
        return ModuleSpec(*live.shape, live.rank, live.dtype, self.scaling)

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The live parameters that hold factors ``"A"`` and ``"B"``, in the layer's own shapes."""

    @abstractmethod
    def keys(self) -> dict[str, str]:
        """The names of ``"A"`` and ``"B"`` below the layer in PEFT's adapter files."""

    @abstractmethod
    def stored_factor(self, letter: str, matrix: Tensor) -> Tensor:
        """A factor, ``(r, d_in)`` or ``(d_out, r)``, in the shape of the layer's parameters."""

    @abstractmethod
    def stored_weight(self, matrix: Tensor) -> Tensor:
        """A ``(d_out, d_in)`` matrix in the shape and orientation of the frozen weight."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the frozen weight's shape as a ``(d_out, d_in)`` matrix."""

    @abstractmethod
    def _place(self, slot: str, a: Tensor, b: Tensor | None) -> None:
        """Put frozen factors into PEFT's place for adapter ``slot``; no ``b`` is the identity."""

    @abstractmethod
    def _placed(self, slot: str) -> tuple[Tensor, Tensor | None]:
        """What :meth:`_place` put there."""

    @abstractmethod
    def sample(self, x: Tensor, count: int) -> Tensor:
        """Up to ``count`` of the vectors that the layer maps one by one, evenly from its input.

        Of a convolution's input, up to ``count`` images, as their places are not mapped singly.
        """

    @abstractmethod
    def _into_rank(self, a: Tensor, x: Tensor) -> Tensor:
        """What the layer makes of its input ``x`` with ``a``, ``(n, d_in)``, for its weight."""

    @abstractmethod
    def _from_rank(self, b: Tensor, inner: Tensor) -> Tensor:
        """``b``, ``(d_out, n)``, applied to what :meth:`_into_rank` made."""

    def response(self, matrix: LowRank, x: Tensor) -> Tensor:
        """What a layer with ``matrix`` for its weight, and no bias, would make of an input.

        Args:
            matrix: ``(d_out, d_in)``, unscaled.
            x: the layer's input, in its own shape.

        Returns:
            In the shape of the layer's output, float64, on the device of ``x``.
        """
        wide = x.double() if x.is_floating_point() else x
        value = matrix.to(torch.float64).value
        if isinstance(value, Tensor):
            return self._into_rank(value.to(x.device), wide)
        return self._from_rank(value.B.to(x.device), self._into_rank(value.A.to(x.device), wide))

    def factors(self) -> Factors:
        """The live factors: views, not copies."""
        live = self.parameters()
        return Factors(live["A"].detach().flatten(1), live["B"].detach().flatten(1))

    def load(self, factors: Factors, scaling: float) -> None:
        """Set the factors and the scaling; the rank may be another one than before."""
        for letter, parameter in self.parameters().items():
            value = factors.A if letter == "A" else factors.B
            stored = self.stored_factor(letter, value.to(parameter.device, parameter.dtype))
            if stored.shape == parameter.shape:
                parameter.data.copy_(stored)
            else:
                parameter.data = stored.clone()
        self.layer.r[self.adapter] = factors.rank
        self.layer.scaling[self.adapter] = scaling

    def set_side(self, slot: str, matrix: LowRank | None, scaling: float) -> None:
        """Add ``scaling * matrix`` beside the weight as a frozen float32 adapter of PEFT's.

        Args:
            slot: the adapter's name in the layer.
            matrix: ``(d_out, d_in)``; None or zero removes the adapter.
            scaling: what PEFT multiplies it by.
        """
        layer = self.layer
        active = [name for name in layer.active_adapters if name != slot]
        if matrix is None or matrix.is_zero:
            if slot not in layer.r:
                return
            layer.delete_adapter(slot)
        else:
            device = self.parameters()["A"].device
            value = matrix.to(torch.float32).value
            if isinstance(value, Factors):
                self._place(slot, value.A.to(device), value.B.to(device))
            else:
                self._place(slot, value.to(device), None)
            layer.r[slot] = value.rank if isinstance(value, Factors) else value.shape[0]
            layer.scaling[slot], layer.lora_alpha[slot] = scaling, scaling
            layer.lora_dropout[slot] = nn.Identity()
            layer.use_rslora[slot] = layer.use_dora[slot] = layer.lora_bias[slot] = False
            active.append(slot)
        frozen = [p for p in self.parameters().values() if not p.requires_grad]
        layer.set_adapter(active)
        # PEFT makes every active adapter trainable.
        for parameter in (*frozen, *self._side_parameters()):
            parameter.requires_grad_(False)
        self._set_wide_sum(set(layer.r) != {self.adapter})

    def _set_wide_sum(self, wanted: bool) -> None:
        """Add branches in float32 while there is one beside the weight."""
        if wanted and not self.wide_sums:
            self.wide_sums.append(WideSum(self.layer))
        while self.wide_sums and not wanted:
            self.wide_sums.pop().remove()

    def side(self, slot: str) -> LowRank | None:
        """What :meth:`set_side` added, as it is applied now but unscaled, or None."""
        if slot not in self.layer.r:
            return None
        a, b = self._placed(slot)
        return LowRank(a.detach() if b is None else Factors(a.detach(), b.detach()))

    def side_scaling(self, slot: str) -> float:
        """What PEFT multiplies the side adapter by."""
        return float(self.layer.scaling[slot])

    def _side_parameters(self) -> list[nn.Parameter]:
        others = set(self.layer.r) - {self.adapter}
        return [p for path, p in self.layer.named_parameters() if others & set(path.split("."))]


class ProductModule(AdaptedModule):
    """A Linear, Conv1D or convolution layer, dense or quantised: two modules one after another."""

    __slots__ = ()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights of ``lora_A`` and ``lora_B``."""
        a, b = self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]
        return {"A": a.weight, "B": b.weight}

    def keys(self) -> dict[str, str]:
        """PEFT's names of the factors."""
        return dict(PRODUCT_KEYS)

    def stored_factor(self, letter: str, matrix: Tensor) -> Tensor:
        """Matrices are stored as they are; a convolution's get their kernels back."""
        return matrix.reshape(*matrix.shape[:1], -1, *self.parameters()[letter].shape[2:])

    def stored_weight(self, matrix: Tensor) -> Tensor:
        """Conv1D is stored ``(d_in, d_out)``, a convolution with its kernel unflattened."""
        if getattr(self.layer, "fan_in_fan_out", False):
            return matrix.T
        return matrix.reshape(*matrix.shape[:1], -1, *self._kernel())

    def matrix(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`stored_weight`."""
        return weight.T if getattr(self.layer, "fan_in_fan_out", False) else weight.flatten(1)

    def _kernel(self) -> tuple[int, ...]:
        return tuple(self.parameters()["A"].shape[2:])

    def sample(self, x: Tensor, count: int) -> Tensor:
        """Positions of tokens; images of a convolution."""
        if not self._kernel():
            return _evenly(x.flatten(0, -2), count)
        return x[:count] if x.ndim == len(self._kernel()) + 2 else x

    def _into_rank(self, a: Tensor, x: Tensor) -> Tensor:
        if not self._kernel():
            return x @ a.T
        # The only way to the layer's own stride and padding with another weight than its own.
        convolve: Any = self.base._conv_forward
        made: Tensor = convolve(x, a.reshape(*a.shape[:1], -1, *self._kernel()), None)
        return made

    def _from_rank(self, b: Tensor, inner: Tensor) -> Tensor:
        if not self._kernel():
            return inner @ b.T
        return torch.einsum("mr,nr...->nm...", b, inner)

    def _place(self, slot: str, a: Tensor, b: Tensor | None) -> None:
        down = copy.deepcopy(self.layer.lora_A[self.adapter])
        down.weight = nn.Parameter(self.stored_factor("A", a).contiguous(), requires_grad=False)
        self.layer.lora_A[slot] = down
        if b is None:
            self.layer.lora_B[slot] = nn.Identity()
            return
        up = copy.deepcopy(self.layer.lora_B[self.adapter])
        up.weight = nn.Parameter(self.stored_factor("B", b).contiguous(), requires_grad=False)
        up.bias = None
        self.layer.lora_B[slot] = up

    def _placed(self, slot: str) -> tuple[Tensor, Tensor | None]:
        up = self.layer.lora_B[slot]
        a = self.layer.lora_A[slot].weight.flatten(1)
        return a, None if isinstance(up, nn.Identity) else up.weight.flatten(1)


class EmbeddingModule(AdaptedModule):
    """An Embedding: ``A (r, vocabulary)`` is looked up and ``B (d_out, r)`` applied to the rows."""

    __slots__ = ()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The two bare parameters."""
        layer = self.layer
        return {
            "A": layer.lora_embedding_A[self.adapter],
            "B": layer.lora_embedding_B[self.adapter],
        }

    def keys(self) -> dict[str, str]:
        """PEFT's names of the factors."""
        return dict(EMBEDDING_KEYS)

    def stored_factor(self, letter: str, matrix: Tensor) -> Tensor:
        """As it is."""
        del letter
        return matrix

    def stored_weight(self, matrix: Tensor) -> Tensor:
        """Embeddings are stored ``(d_in, d_out)``."""
        return matrix.T

    def matrix(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`stored_weight`."""
        return weight.T

    def sample(self, x: Tensor, count: int) -> Tensor:
        """Tokens."""
        return _evenly(x.flatten(), count)

    def _into_rank(self, a: Tensor, x: Tensor) -> Tensor:
        rows = nn.functional.embedding(x, a.T)
        scale = self.layer._get_embed_scale()  # what some models multiply the rows by
        return rows if scale is None else rows * scale.double()

    def _from_rank(self, b: Tensor, inner: Tensor) -> Tensor:
        return inner @ b.T

    def _place(self, slot: str, a: Tensor, b: Tensor | None) -> None:
        up = torch.eye(a.shape[0], device=a.device) if b is None else b
        self.layer.lora_embedding_A[slot] = nn.Parameter(a, requires_grad=False)
        self.layer.lora_embedding_B[slot] = nn.Parameter(up, requires_grad=False)

    def _placed(self, slot: str) -> tuple[Tensor, Tensor | None]:
        return self.layer.lora_embedding_A[slot], self.layer.lora_embedding_B[slot]


def _evenly(rows: Tensor, count: int) -> Tensor:
    """Up to ``count`` rows, from the first to the last."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).long()]
