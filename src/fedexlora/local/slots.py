"""Training of some ranks of an adapter: the others are put back after every step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedexlora.local.job import OnStep
from fedexlora.methods.rule import Slots
from fedexlora.peft_bridge.model import AdaptedModel


def after_each(put_back: Callable[[], None], told: OnStep) -> OnStep:
    """What puts back after a step, and then tells of it."""

    def on_step(done: int, steps: int) -> None:
        put_back()
        told(done, steps)

    return on_step


def putting_back(model: AdaptedModel, slots: Slots) -> Callable[[], None]:
    """What sets the rows of A and columns of B that are not meant to what they are now.

    An optimizer may move them without a gradient too, as weight decay does; so what is held is
    their values. The others are what they would be if all were trained.

    Args:
        model: the model; only factors that get gradients are looked at.
        slots: by module, the ranks that are trained.
    """
    held = []
    for name, module in model.modules.items():
        others = (~slots[name]).nonzero().flatten()
        for letter, parameter in module.parameters().items():
            if parameter.requires_grad:
                index, axis = others.to(parameter.device), "AB".index(letter)
                held.append((parameter, axis, index, parameter.detach().index_select(axis, index)))

    @torch.no_grad()
    def put_back() -> None:
        for parameter, axis, index, value in held:
            parameter.index_copy_(axis, index, value)

    return put_back
