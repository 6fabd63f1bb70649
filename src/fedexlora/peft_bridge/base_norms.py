"""The frozen weights beside what is added to them: their norms, and what a bf16 fold would lose."""

from __future__ import annotations

import torch
from torch import Tensor

from fedexlora.algebra.deviation import ratio
from fedexlora.algebra.lowrank import LowRank
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.peft_bridge.modules import AdaptedModule
from fedexlora.peft_bridge.weights import is_quantised, read_weight

FOLD_ROWS = 32
"""Rows of a module on which a fold is tried."""


@torch.no_grad()
def base_norms(model: AdaptedModel) -> dict[str, float]:
    """By module, the Frobenius norm of its frozen weight without any remainder, in float64.

    Args:
        model: the model; each weight is read once.
    """
    return {
        name: float(torch.linalg.vector_norm(_untouched(model, name), dtype=torch.float64))
        for name in model.modules
    }


@torch.no_grad()
def bf16_loss(model: AdaptedModel, name: str, total: LowRank) -> float | None:
    """The share of a remainder that folding it into a bfloat16 weight would lose.

    ``|bf16(W + s R) - W - s R| / |s R|`` with the untouched weight ``W`` in bfloat16, over up to
    :data:`FOLD_ROWS` rows from the first to the last.

    Args:
        model: the model.
        name: the module.
        total: its remainder ``R``, unscaled, ``(M, N)``.

    Returns:
        The share; None where there is no remainder.
    """
    if total.is_zero:
        return None
    weight = _untouched(model, name)
    step = -(-len(weight) // FOLD_ROWS)
    before = weight[::step].to("cpu", torch.bfloat16).double()
    rows = model.spec.modules[name].scaling * _rows(total, step)
    lost = (before + rows).bfloat16().double() - before - rows
    return ratio(float(lost.norm()), float(rows.norm()))


def _rows(total: LowRank, step: int) -> Tensor:
    value = total.value
    if isinstance(value, Tensor):
        return value[::step].double()
    return value.B[::step].double() @ value.A.double()


def _untouched(model: AdaptedModel, name: str) -> Tensor:
    """A module's frozen weight as at version 0, ``(M, N)``; not a copy where that is there."""
    module: AdaptedModule = model.modules[name]
    held = model.untouched.get(name)
    if held is None:
        held = read_weight(module.base) if is_quantised(module.weight) else module.weight.detach()
    return module.matrix(held)
