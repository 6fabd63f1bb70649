"""A layer's branches added in float32, and their sum rounded once.

PEFT rounds ``W x`` to 16 bits on a narrow base or under autocast and then adds the branches to it,
on some layers rounding every one of them: a small remainder beside the weight is rounded away,
however exactly it is held. With ``W x`` widened before the first branch is added, PEFT's own sum is
one of float32 numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class WideSum:
    """Hooks around a LoRA layer and its frozen layer; others that call the latter see no change.

    Args:
        layer: the LoRA layer.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self._inside = False
        self._narrow: torch.dtype | None = None
        self._handles: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self._enter),
            layer.get_base_layer().register_forward_hook(self._widen),
            layer.register_forward_hook(self._round, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the layer as it was."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        del layer, args
        self._inside, self._narrow = True, None

    def _widen(self, base: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        del base, args
        if not self._inside or output.dtype.itemsize >= torch.float32.itemsize:
            return None
        self._narrow = output.dtype
        return output.float()

    def _round(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:  # noqa: ANN401
        del layer, args
        self._inside = False
        if self._narrow is None or not isinstance(output, Tensor):  # nothing, after an error
            return None
        return output.to(self._narrow)
