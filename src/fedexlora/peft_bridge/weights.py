"""A layer's frozen weight in whatever form it is stored: floats, or bitsandbytes' 8 and 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

_QUANTISED = ("Params4bit", "Int8Params")


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is stored in bitsandbytes' 4-bit or 8-bit form.

    By the name of its class: bitsandbytes need not be installed.
    """
    return type(weight).__name__ in _QUANTISED


def precision(weight: Any) -> str:  # noqa: ANN401 - bitsandbytes' classes have more than Tensor
    """A weight's storage for people: ``float32``, ``bfloat16``, ``int8``, ``nf4`` and so on."""
    if type(weight).__name__ == "Params4bit":
        return str(weight.quant_type)
    return str(weight.dtype).removeprefix("torch.")


def read_weight(base: Any) -> Tensor:  # noqa: ANN401
    """The weight that a layer applies, as stored, float32 or wider, not shared with the layer."""
    weight: Tensor = base.weight
    if is_quantised(weight):
        dense: Tensor = dequantize_module_weight(base)
        return dense.detach().float().clone()
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def write_weight(base: Any, dense: Tensor) -> None:  # noqa: ANN401
    """Store a weight as the layer stores it, with all the rounding that this causes."""
    weight = base.weight
    if not is_quantised(weight):
        weight.data.copy_(dense)
        return
    options = (
        {"quant_type": weight.quant_type, "compress_statistics": weight.compress_statistics}
        if type(weight).__name__ == "Params4bit"
        else {"has_fp16_weights": weight.has_fp16_weights}
    )
    fresh = type(weight)(dense.float().cpu(), requires_grad=False, **options).to(weight.device)
    base.weight = fresh
    if hasattr(base, "state"):
        base.state.reset_grads()


def half_ulp(weight: Tensor) -> Tensor:
    """Half a unit in the last place of every entry of a floating-point weight, float64."""
    size = weight.detach().abs()
    step = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    return step.cpu().double() / 2
