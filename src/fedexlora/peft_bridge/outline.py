"""What is known of a PEFT model by its shapes and dtypes alone, also of one without weights."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from torch import nn

from fedexlora.exchange.spec import AdapterSpec, TensorSpec
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.heads import widen_heads
from fedexlora.peft_bridge.inspect import adapted_modules, dense_parameters
from fedexlora.peft_bridge.modules import AdaptedModule
from fedexlora.peft_bridge.placement import Placement, folded_modules
from fedexlora.peft_bridge.statistics import freeze_statistics
from fedexlora.peft_bridge.weights import precision


class ModelOutline:
    """The adapted modules of a model, what of it is trained, and where remainders live.

    Args:
        model: the PEFT model; owned and changed from now on.
        trained: the factors that are trained, ``("A", "B")`` or ``("B",)``; others are frozen.
        placement: ``auto`` folds into float32 weights that no other layer shares, if all
            ``arithmetics`` multiply them in float32, and rides beside all others, which is exact;
            ``side`` never folds; ``fold`` always does, with the error that a narrower weight or
            product causes.
        arithmetics: those of all forward passes, in training and in scoring.
        adapter: the name of the adapter in ``model``.

    Raises:
        BridgeError: if the model cannot be aggregated exactly, with every reason.
    """

    def __init__(
        self,
        model: PeftModel,
        trained: tuple[str, ...] = ("A", "B"),
        placement: Placement = "auto",
        arithmetics: Sequence[Arithmetic] = (Arithmetic(),),
        adapter: str = "default",
    ) -> None:
        self.peft_model = model
        self.arithmetics = tuple(dict.fromkeys(arithmetics))
        self.adapter = adapter
        self.modules: dict[str, AdaptedModule] = adapted_modules(model, adapter)
        widen_heads(model, adapter)
        freeze_statistics(model)
        self._dense: dict[str, nn.Parameter] = dense_parameters(model, adapter)
        for module in self.modules.values():
            for letter, parameter in module.parameters().items():
                parameter.requires_grad_(letter in trained)
        self.spec = AdapterSpec(
            {name: module.spec for name, module in self.modules.items()},
            {name: TensorSpec.of(tensor) for name, tensor in self._dense.items()},
            trained,
        )
        narrow = any(arithmetic.narrows for arithmetic in self.arithmetics)
        self._folded = folded_modules(model, self.modules, placement, narrow_products=narrow)

    def placement(self, name: str) -> str:
        """Where the module's remainder lives: ``fold`` or ``side``."""
        return "fold" if name in self._folded else "side"

    def precision(self) -> str:
        """How the adapted weights are stored: ``float32``, ``nf4`` and so on, the distinct ones."""
        return " and ".join(sorted({precision(m.weight) for m in self.modules.values()}))
