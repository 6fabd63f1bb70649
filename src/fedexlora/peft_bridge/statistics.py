"""Frozen layers with running statistics, such as BatchNorm: their statistics stay as they are.

In training mode they would normalise by the batch and move their statistics with it: every client
would end with another base, and would have trained another function than the one that is scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedexlora.peft_bridge.inspect import base_name, is_frozen_base


def freeze_statistics(model: nn.Module) -> None:
    """Have every layer with running statistics use them in training too, and never move them.

    Args:
        model: the PEFT model; its trained heads have no such layers.
    """
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            # Whoever trains calls `model.train()` again and again, so that a mode does not last.
            module.register_forward_pre_hook(_use_statistics)


def frozen_buffers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """The buffers of the frozen base that its files hold, by their names in the base model."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=path, recurse=False):
            persistent = name.rpartition(".")[2] not in module._non_persistent_buffers_set
            if persistent and is_frozen_base(name, adapter):
                yield base_name(name), buffer


def _use_statistics(module: nn.Module, args: tuple[Any, ...]) -> None:
    del args
    module.training = False
