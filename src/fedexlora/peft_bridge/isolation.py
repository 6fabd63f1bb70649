"""What local training changes of a model beside what it trains, put back when it ends.

Libraries leave much on a model that they trained: accelerate a ``forward`` that runs under
autocast, gradient checkpointing its hooks and flags, ``Trainer`` values in configurations. A model
that serves one client after the other, and is scored in between, would then compute otherwise
than the same model loaded anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfigMixin
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from fedexlora.errors import BridgeError
from fedexlora.peft_bridge.arithmetic import float32_settings
from fedexlora.peft_bridge.inspect import base_name

_CONFIGURATIONS = (PretrainedConfig, GenerationConfig, PeftConfigMixin)
_CONTAINERS = (dict, list, set)


@contextmanager
def isolation(model: nn.Module) -> Iterator[None]:
    """Let the block train a model, and leave of it nothing but the values that it trained.

    Put back are the attributes of every module and configuration (hooks, flags, patched methods,
    modes), which parameters are trained, gradients, buffers, and the process's settings of
    float32 products and determinism; also if the block fails.

    Args:
        model: the model; its parameters that require gradients may change their values.

    Raises:
        BridgeError: if the block changed a frozen weight, or a buffer that the model's files
            hold, with every name.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    frozen = [(name, p, p._version) for name, p in model.named_parameters() if not p.requires_grad]
    buffers = [_Buffer(*place) for place in _buffers(model)]
    attributes = [_Attributes(holder) for holder in _holders(model)]
    with process_settings():
        try:
            yield
            faults = [
                f"{base_name(name)}: a frozen weight was written"
                for name, p, version in frozen
                if p._version != version
            ]
            faults += [fault for buffer in buffers if (fault := buffer.fault())]
        finally:
            for kept in attributes:
                kept.restore()
            for buffer in buffers:
                buffer.restore()
            for parameter, trained, gradient in parameters:
                parameter.requires_grad_(trained)
                parameter.grad = gradient
    if faults:
        raise BridgeError(
            "local training changed what is frozen, so that clients would no longer share a base",
            [*faults, "use a model whose forward pass in training writes nothing"],
        )


@contextmanager
def process_settings() -> Iterator[None]:
    """Put the process's settings of float32 products and determinism back after the block."""
    cudnn: Any = torch.backends.cudnn
    precisions = [(holder, holder.fp32_precision) for holder in float32_settings()]
    chosen = cudnn.deterministic, cudnn.benchmark
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        for holder, precision in precisions:
            holder.fp32_precision = precision
        cudnn.deterministic, cudnn.benchmark = chosen
        torch.use_deterministic_algorithms(strict, warn_only=warns)


class _Attributes:
    """The attributes of one object, and what is in those that are containers."""

    def __init__(self, holder: object) -> None:
        self._holder = holder
        self._values = dict(vars(holder))
        self._contents = [
            (value, value.copy())
            for value in self._values.values()
            if isinstance(value, _CONTAINERS)
        ]

    def restore(self) -> None:
        """Set everything as it was, in the same containers."""
        live = vars(self._holder)
        live.clear()
        live.update(self._values)
        for container, content in self._contents:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)


class _Buffer:
    """One buffer of a module, and its values."""

    def __init__(self, path: str, module: nn.Module, name: str, value: Tensor) -> None:
        self._path = path
        self._module = module
        self._name = name
        self._live = value
        self._value = value.detach().clone()

    def fault(self) -> str | None:
        """That it has other values than before, if the model's files hold it."""
        if self._name in self._module._non_persistent_buffers_set:
            return None
        now = self._module._buffers.get(self._name)
        if now is not None and now.shape == self._value.shape and _same(now, self._value):
            return None
        kind = type(self._module).__name__
        return f"{base_name(self._path)}.{self._name}: this {kind} changes it in training"

    def restore(self) -> None:
        """Set its values as they were; the module has it again already."""
        if not _same(self._live, self._value):
            with torch.no_grad():
                self._live.copy_(self._value)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, NaN included."""
    if torch.equal(one, other):
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for path, module in model.named_modules():
        for name, value in module._buffers.items():
            if value is not None:
                yield path, module, name, value


def _holders(model: nn.Module) -> Iterable[object]:
    """Every module and every configuration that one refers to, each once."""
    found: dict[int, object] = {}
    waiting: list[object] = list(model.modules())
    while waiting:
        holder = waiting.pop()
        if id(holder) in found:
            continue
        found[id(holder)] = holder
        for value in vars(holder).values():
            inner = value.values() if isinstance(value, dict) else (value,)
            waiting += [x for x in inner if isinstance(x, _CONFIGURATIONS)]
    return found.values()
