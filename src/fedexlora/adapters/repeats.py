"""Adapters that add nothing to a mean, or count twice in it: nobody gives them on purpose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedexlora.exchange.tensors import pieces
from fedexlora.peft_bridge.adapter_file import AdapterFile


def is_zero(adapter: AdapterFile) -> bool:
    """Whether every layer's update is zero; reads on only as long as it is."""
    return not any(
        bool(adapter.factor(name, "B").any()) and bool(adapter.factor(name, "A").any())
        for name in adapter.modules
    )


def copies(adapters: Sequence[AdapterFile]) -> list[int | None]:
    """For each adapter, the first before it that holds the same numbers, or None."""
    found: list[int | None] = []
    for place, adapter in enumerate(adapters):
        earlier = [i for i in range(place) if found[i] is None]
        found.append(next((i for i in earlier if _same(adapters[i], adapter)), None))
    return found


def _same(x: AdapterFile, y: AdapterFile) -> bool:
    """Whether two adapters are one; compares until the first difference."""
    if x.folder.resolve() == y.folder.resolve():
        return True
    scalings = [{n: m.scaling for n, m in adapter.modules.items()} for adapter in (x, y)]
    if scalings[0] != scalings[1] or x.keys.keys() != y.keys.keys():
        return False
    if any(x.file.tensors[x.keys[n]] != y.file.tensors[y.keys[n]] for n in x.keys):
        return False
    # B first: a shared or frozen A is the same in adapters that differ.
    names = sorted(x.keys, key=lambda name: "lora_A" in name or "embedding_A" in name)
    return all(
        torch.equal(x.rows(name, *part), y.rows(name, *part))
        for name in names
        for part in pieces(x.file.tensors[x.keys[name]])
    )
