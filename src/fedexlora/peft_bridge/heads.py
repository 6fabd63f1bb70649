"""Trained heads on a low-precision base: held in float32, so that their mean is not rounded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn


def widen_heads(model: PeftModel, adapter: str) -> None:
    """Give the trained copies of ``modules_to_save`` float32 parameters.

    Their inputs are cast to float32 and their outputs to what the frozen module would return, so
    that the layers around them go on in their own dtype.
    """
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter not in wrapper.modules_to_save:
            continue
        head = wrapper.modules_to_save[adapter]
        narrow = _dtypes(head.parameters()) - {torch.float32}
        if not narrow:
            continue
        head.float()
        head.register_forward_pre_hook(_widen, with_kwargs=True)
        head.register_forward_hook(_Narrow(narrow.pop()))


def _dtypes(parameters: Iterable[nn.Parameter]) -> set[torch.dtype]:
    return {p.dtype for p in parameters if p.dtype.is_floating_point}


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return value.to(dtype)
    return value


def _widen(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    wide = torch.float32
    return tuple(_cast(x, wide) for x in args), {k: _cast(x, wide) for k, x in kwargs.items()}


class _Narrow:
    """Casts a head's output back."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, *call: object) -> object:
        return _cast(call[-1], self.dtype)
