"""The numbers in which a forward pass multiplies, and what its layers make of float32 operands.

Autocast casts the operands of every product to 16 bits; TF32 keeps 10 of a float32's 23 bits. A
remainder that is folded into a float32 weight is then used as what is left of it after that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedexlora.errors import BridgeError

Width = Literal["float32", "bfloat16", "float16"]
"""The floating-point types that a recipe may name."""

_TF32_DROPPED = 13
"""Bits of a float32's mantissa that TF32 has not."""
_NAMES = {"no": "", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a forward pass multiplies."""

    autocast: torch.dtype | None = None
    """What operands of products are cast to; None where layers multiply in their own dtype."""
    tf32: bool = False
    """Whether products of float32 operands are TF32."""

    @staticmethod
    def of_training(arguments: Any) -> Arithmetic:  # noqa: ANN401 - transformers is untyped here
        """That of a ``TrainingArguments``, with what its environment adds to it.

        Raises:
            BridgeError: if it is another mixed precision than with 16-bit floats.
        """
        if arguments.mixed_precision not in _NAMES:
            raise BridgeError(
                f"mixed precision {arguments.mixed_precision!r} is not supported",
                [f"expected one of {', '.join(_NAMES)}"],
            )
        name = _NAMES[arguments.mixed_precision]
        return Arithmetic(getattr(torch, name) if name else None, arguments.tf32 is True)

    @staticmethod
    def of_scoring(chosen: Width, weights: Width) -> Arithmetic:
        """That of a model whose weights are ``weights``, scored in ``chosen``."""
        return Arithmetic(None if chosen == weights else getattr(torch, chosen))

    @property
    def narrows(self) -> bool:
        """Whether products lose bits of float32 operands."""
        return self.tf32 or self.autocast is not None

    def __str__(self) -> str:
        if self.autocast is not None:
            return f"{str(self.autocast).removeprefix('torch.')} autocast"
        return "TF32" if self.tf32 else "the layers' own dtypes"

    def operand(self, tensor: Tensor) -> Tensor:
        """An operand of a product as it is multiplied: rounded, then widened to float64."""
        kept = tensor.detach().cpu()
        if self.autocast is not None and kept.dtype != torch.float64:
            return kept.to(self.autocast).double()
        if self.tf32 and kept.dtype == torch.float32:
            return _tf32(kept).double()
        return kept.double()

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Compute so while the block runs, whatever was set before.

        Args:
            device: where the model is.
        """
        cast = (
            torch.autocast(device.type, self.autocast)
            if self.autocast is not None
            else torch.autocast(device.type, enabled=False)
            if torch.amp.is_autocast_available(device.type)
            else nullcontext()
        )
        with float32_products(tf32=self.tf32), cast:
            yield


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Have float32 operands multiplied in full, or as TF32, while the block runs."""
    holders = float32_settings()
    before = [holder.fp32_precision for holder in holders]
    for holder in holders:
        holder.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for holder, precision in zip(holders, before, strict=True):
            holder.fp32_precision = precision


def float32_settings() -> Sequence[Any]:
    """What has an ``fp32_precision``: torch's own first, then those that may differ from it."""
    backends: Any = torch.backends
    return (
        backends,
        backends.cuda.matmul,
        backends.cudnn,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
    )


def _tf32(tensor: Tensor) -> Tensor:
    """Float32 numbers rounded to TF32, to nearest, ties to even."""
    bits = tensor.contiguous().view(torch.int32)
    half = (1 << (_TF32_DROPPED - 1)) - 1
    odd = (bits >> _TF32_DROPPED) & 1
    kept = (bits + half + odd) >> _TF32_DROPPED << _TF32_DROPPED
    return torch.where(tensor.isfinite(), kept.view(torch.float32), tensor)
