"""What the layers of a live model do in a forward pass: what they multiply by, what comes out.

An update can be held exactly and still not be applied: a layer rounds its operands to the dtype in
which it multiplies, and its output to the dtype that it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.algebra.probes import Probes
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.model import REMAINDER, AdaptedModel, side_slots
from fedexlora.peft_bridge.modules import AdaptedModule
from fedexlora.peft_bridge.weights import multiplied_dtype, read_weight, replaced_weight

_NUMBERS = 1 << 17
"""Numbers of a layer's output from which its share is estimated."""


@torch.no_grad()
def multiplied_image(
    model: AdaptedModel, name: str, arithmetic: Arithmetic, probes: Probes
) -> Tensor:
    """What a module multiplies its input by, less what it multiplied it by at version 0.

    Every operand (the weight, the factors, a dense matrix beside the weight) is rounded as
    ``arithmetic`` has the layer round it; products of the rounded operands are float64.

    Args:
        model: the live model.
        name: the module.
        arithmetic: of the forward pass.
        probes: what the matrix ``(M, N)`` is measured by; all unit vectors give it itself.

    Returns:
        Scaled, ``(M, q)``, float64, on the processor.
    """
    module, operand = model.modules[name], arithmetic.operand
    live = module.factors()
    image = probes.add(probes.zeros(live.shape), _rounded(live, arithmetic), module.scaling)
    for slot in side_slots(module):
        side = module.side(slot)
        if side is None:
            continue
        scaling, value = module.side_scaling(slot), side.value
        if isinstance(value, Factors):
            probes.add(image, _rounded(value, arithmetic), scaling)
        else:
            probes.add_rows(image, len(value), partial(_operand_rows, operand, value), scaling)
    if name in model.start:
        probes.add(image, _rounded(model.start[name], arithmetic), -module.scaling)
    if name in model.untouched:
        own = multiplied_dtype(module.base)
        now = module.matrix(read_weight(module.base).to(own))
        before = module.matrix(model.untouched[name].to(own))
        probes.add_rows(image, len(now), lambda part: operand(now[part]) - operand(before[part]))
    return image


@dataclass(slots=True)
class Kept:
    """How much of a remainder comes out of a layer: sums of a regression through zero.

    The layer's output with the remainder less that without it is regressed on the exact ``R x``.
    """

    exact: float = 0.0
    """``sum e^2`` of what should come out, ``e = R x``."""
    shared: float = 0.0
    """``sum c e`` with what does come out, ``c``."""
    changed: float = 0.0
    """``sum c^2``."""
    numbers: int = 0

    def add(self, changed: Tensor, exact: Tensor) -> None:
        """Add numbers of a layer's output.

        Args:
            changed: what the remainder changes in the output, any shape, float64.
            exact: what it should change, of the same shape, float64.
        """
        self.exact += float(exact.square().sum())
        self.shared += float((changed * exact).sum())
        self.changed += float(changed.square().sum())
        self.numbers += changed.numel()

    def plus(self, other: Kept) -> Kept:
        """The sums of both."""
        return Kept(
            self.exact + other.exact,
            self.shared + other.shared,
            self.changed + other.changed,
            self.numbers + other.numbers,
        )

    @property
    def share(self) -> float:
        """The regression's coefficient; 1 is all of the remainder."""
        return self.shared / self.exact if self.exact else 1.0

    @property
    def standard_error(self) -> float:
        """Of ``share``: rounding is noise, which only large outputs average out."""
        if not self.exact:
            return 0.0
        left = max(0.0, self.changed - self.share * self.shared)
        return sqrt(left / self.numbers / self.exact) if self.numbers else inf


@torch.no_grad()
def measure_kept(
    model: AdaptedModel, remainders: Mapping[str, LowRank], forward: Callable[[], object]
) -> dict[str, Kept]:
    """How much of every module's remainder comes out of its layer, over real inputs.

    Args:
        model: the live model, with the version applied.
        remainders: by module, unscaled, ``(d_out, d_in)``; those that are zero are not measured.
        forward: runs the model on some inputs, in the arithmetic that is to be measured.

    Returns:
        By module that has a remainder, in the order of the model.
    """
    found: dict[str, Kept] = {}
    with ExitStack() as hooks:
        for name, module in model.modules.items():
            if not remainders[name].is_zero:
                found[name] = Kept()
                probe = _Probe(model, module, remainders[name], found[name])
                handle = module.layer.register_forward_pre_hook(probe)
                hooks.callback(handle.remove)
        if found:
            forward()
    return found


@contextmanager
def without_remainder(model: AdaptedModel, name: str) -> Iterator[None]:
    """Have a module compute without its remainder while the block runs."""
    module = model.modules[name]
    if name in model.untouched:
        with replaced_weight(module.base, model.untouched[name]):
            yield
    elif module.side(REMAINDER) is None:
        yield
    else:
        scaling = module.side_scaling(REMAINDER)
        module.layer.scaling[REMAINDER] = 0.0
        try:
            yield
        finally:
            module.layer.scaling[REMAINDER] = scaling


class _Probe:
    """A hook that has its layer compute a part of its input with the remainder and without it."""

    def __init__(
        self, model: AdaptedModel, module: AdaptedModule, remainder: LowRank, kept: Kept
    ) -> None:
        self._model = model
        self._module = module
        self._remainder = remainder
        self._scaling = model.spec.modules[module.name].scaling
        self._kept = kept
        self._again = False

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        missing = _NUMBERS - self._kept.numbers
        if self._again or missing <= 0:
            return
        x = self._module.sample(args[0], -(-missing // self._module.factors().shape[0]))
        self._again = True
        try:
            after = layer(x)
            with without_remainder(self._model, self._module.name):
                before = layer(x)
        finally:
            self._again = False
        # Not every accelerator has float64.
        changed = after.cpu().double() - before.cpu().double()
        with torch.autocast("cpu", enabled=False):
            exact = self._scaling * self._module.response(self._remainder, x.cpu())
        self._kept.add(changed, exact)


def _rounded(pair: Factors, arithmetic: Arithmetic) -> Factors:
    """Factors as they are multiplied, widened to float64."""
    return Factors(arithmetic.operand(pair.A), arithmetic.operand(pair.B))


def _operand_rows(operand: Callable[[Tensor], Tensor], matrix: Tensor, part: slice) -> Tensor:
    return operand(matrix[part])
