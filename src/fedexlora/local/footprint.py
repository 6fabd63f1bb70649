"""What a step of local training and a batch of scoring hold beside the weights, in bytes.

The step is taken on a model without numbers, in torch's fake tensors, which have shapes, dtypes and
lifetimes alone. What is counted is what torch allocates for tensors: activations, gradients, the
optimizer's state. It is exact where every tensor is given back at once; the heap of a C library
keeps gaps.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from fedexlora.local.arguments import arguments, training_arithmetic
from fedexlora.local.trainer import Collator
from fedexlora.peft_bridge.arithmetic import Arithmetic

_HEAP_TENSOR = 32 << 20
"""Bytes below which glibc may put a tensor on its heap; larger ones are given back at once."""
_GAPS = 0.6
"""What the heap has beside the tensors on it, as a share of these. Measured with steps of rows of
several lengths: 0.3 to 0.9, the more the smaller the tensors are."""
_CPU = torch.device("cpu")
"""What fake tensors say that they are on; what is allocated is about the same everywhere."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """The most bytes that are held at once."""

    tensors: int
    on_heap: int
    """Of these, in tensors that a processor's heap has."""

    def on(self, device: torch.device) -> int:
        """With the gaps of the heap, if that is where tensors are."""
        return self.tensors + (round(_GAPS * self.on_heap) if device.type == "cpu" else 0)


def training_footprint(
    model: nn.Module, rows: Dataset, collator: Collator, options: Mapping[str, Any]
) -> Footprint:
    """What the first step on the longest rows holds at once, with gradients and optimizer.

    Args:
        model: a PEFT model without weights; its modes and hooks change.
        rows: tokenised rows with their ``length``, at least one.
        collator: rows to a padded batch.
        options: fields of ``TrainingArguments``.
    """
    made = arguments(options, seed=0, folder=tempfile.gettempdir())
    if made.gradient_checkpointing:
        enable: Any = model.gradient_checkpointing_enable
        enable(made.gradient_checkpointing_kwargs or {"use_reentrant": False})
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(made, model)
    model.train()

    def step(fake: nn.Module, batch: Mapping[str, Tensor]) -> None:
        with training_arithmetic(options).active(_CPU):
            loss = fake(**batch).loss
        loss.backward()
        parameters = [p for p in fake.parameters() if p.requires_grad]
        optimizer(parameters, **settings).step()

    return _peak(model, collator(_longest(rows, made.train_batch_size)), step)


def scoring_footprint(
    model: nn.Module, rows: Dataset, collator: Collator, batch_size: int, arithmetic: Arithmetic
) -> Footprint:
    """What scoring the longest rows holds at once, up to the outputs.

    Args:
        model: a PEFT model without weights; its modes change.
        rows: tokenised rows with their ``length``, at least one.
        collator: rows to a padded batch.
        batch_size: most rows of a batch.
        arithmetic: how the model multiplies then.
    """
    model.eval()

    def score(fake: nn.Module, batch: Mapping[str, Tensor]) -> None:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.no_grad(), arithmetic.active(_CPU):
            logits = fake(**inputs).logits
            logits.float() if logits.ndim == 3 else logits

    return _peak(model, collator(_longest(rows, batch_size)), score)


def writing_footprint(
    model: nn.Module, sequences: int, length: int, arithmetic: Arithmetic
) -> Footprint:
    """What writing texts holds at once: keys and values of every token, and a pass over them.

    Args:
        model: a PEFT model without weights; its modes change.
        sequences: that are written side by side.
        length: of the longest prompt and its text, in tokens.
        arithmetic: how the model multiplies then.
    """
    model.eval()
    ids = torch.zeros(sequences, length, dtype=torch.long)

    def write(fake: nn.Module, batch: Mapping[str, Tensor]) -> None:
        with torch.no_grad(), arithmetic.active(_CPU):
            fake(**batch, use_cache=True, logits_to_keep=1)

    return _peak(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, write)


def _longest(rows: Dataset, count: int) -> list[dict[str, Any]]:
    order = np.argsort(-np.asarray(rows["length"][:]), kind="stable")[:count]
    return list(rows.select(order))


def _peak(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    work: Callable[[nn.Module, Mapping[str, Tensor]], None],
) -> Footprint:
    """The most bytes that ``work`` has allocated at once."""
    with FakeTensorMode(allow_non_fake_inputs=True), _without_numbers(model):
        fake = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in batch.items()}
        counted = _Allocations([*model.parameters(), *model.buffers(), *fake.values()])
        with counted:
            work(model, fake)
        return counted.most


@contextmanager
def _without_numbers(model: nn.Module) -> Iterator[None]:
    """Fake parameters and buffers in the places of those on the meta device."""
    places: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is None:
                    continue
                if id(value) not in made:
                    made[id(value)] = _fake(value)
                places.append((held, name, value))
                held[name] = made[id(value)]  # type: ignore[assignment] # of the same kind
    try:
        yield
    finally:
        for held, name, value in places:
            held[name] = value


def _fake(value: Tensor) -> Tensor:
    if not value.is_meta:  # small constants that a model computes when it is made
        return value
    fake = torch.empty(value.shape, dtype=value.dtype)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(fake, requires_grad=value.requires_grad)
    return fake


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Counts the bytes of storages that operations make, for as long as they live.

    Args:
        there: tensors that are not counted; views of them have their storages.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.most = Footprint(0, 0)
        self._now = self._on_heap = 0
        self._there = [tensor.untyped_storage() for tensor in there]
        self._alive = {storage._cdata for storage in self._there}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - the signature is torch's
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self._add(size)
        if self._now > self.most.tensors:
            self.most = Footprint(self._now, self._on_heap)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._add(-size)

    def _add(self, size: int) -> None:
        self._now += size
        if abs(size) < _HEAP_TENSOR:
            self._on_heap += size
