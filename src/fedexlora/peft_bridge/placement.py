"""Which modules' remainder is folded into the frozen weight, and which rides beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from peft import PeftModel

from fedexlora.errors import BridgeError
from fedexlora.peft_bridge.inspect import place_of, shared_weights
from fedexlora.peft_bridge.modules import AdaptedModule
from fedexlora.peft_bridge.weights import is_quantised

Placement = Literal["auto", "fold", "side"]


def folded_modules(
    model: PeftModel,
    modules: Mapping[str, AdaptedModule],
    placement: Placement,
    *,
    narrow_products: bool = False,
) -> frozenset[str]:
    """The modules whose remainder is folded into the frozen weight.

    Args:
        model: the PEFT model.
        modules: its adapted modules.
        placement: ``auto`` folds into float32 weights that no other layer shares and that every
            forward pass multiplies in float32; ``fold`` folds into all; ``side`` into none.
        narrow_products: whether some forward passes lose bits of float32 weights, as under
            autocast.

    Raises:
        BridgeError: if ``fold`` is asked for and a weight is shared, with every such module.
    """
    shared = shared_weights(model)
    tied = {name for name, m in modules.items() if place_of(m.weight) in shared}
    if placement == "fold" and tied:
        raise BridgeError(
            "federation.placement = 'fold': these weights are shared with other layers, which the "
            "remainder would change too; use 'auto' or 'side'",
            sorted(tied),
        )
    if placement == "auto":
        return frozenset(
            name
            for name, m in modules.items()
            if not narrow_products
            and name not in tied
            and m.weight.dtype == torch.float32
            and not is_quantised(m.weight)
        )
    return frozenset(modules) if placement == "fold" else frozenset()
