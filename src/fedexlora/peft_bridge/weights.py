"""A layer's frozen weight in whatever form it is stored: floats, or bitsandbytes' 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
        # PEFT gives an 8-bit layer another weight on the way, which is half prepared to run.
        with _as_it_is(weight), _as_it_is(getattr(base, "state", None)):
            dense: Tensor = dequantize_module_weight(base)
        base.weight = weight
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


def multiplied_dtype(base: Any) -> torch.dtype:  # noqa: ANN401
    """The dtype in which a layer multiplies its weight, where nothing casts it."""
    if not is_quantised(base.weight):
        dtype: torch.dtype = base.weight.dtype
        return dtype
    return getattr(base, "compute_dtype", None) or torch.float32


@contextmanager
def replaced_weight(base: Any, dense: Tensor) -> Iterator[None]:  # noqa: ANN401
    """Have a layer apply another weight while the block runs; then the very one that it had.

    Args:
        base: the layer.
        dense: the weight, in the layer's own shape; stored as the layer stores it.
    """
    kept = base.weight
    data = kept.data
    with _as_it_is(getattr(base, "state", None)):  # where 8-bit layers hold what they have run with
        try:
            if is_quantised(kept):
                write_weight(base, dense)
            else:
                kept.data = dense.to(data.device, data.dtype)
            yield
        finally:
            kept.data = data
            base.weight = kept


@contextmanager
def _as_it_is(holder: object) -> Iterator[None]:
    """Put back an object's attributes when the block ends; None has none."""
    kept = dict(vars(holder)) if holder is not None else {}
    try:
        yield
    finally:
        if holder is not None:
            vars(holder).clear()
            vars(holder).update(kept)


def half_ulp(weight: Tensor) -> Tensor:
    """Half a unit in the last place of every entry of a floating-point weight, float64."""
    size = weight.detach().abs()
    step = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    return step.cpu().double() / 2
