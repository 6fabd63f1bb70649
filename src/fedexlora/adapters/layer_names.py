"""One layer by several names: versions of transformers, and models with or without a head."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedexlora.peft_bridge.adapter_file import StoredModule

_PARTS = frozenset({"model", "language_model", "text_model", "llm", "transformer"})
"""Parts of a layer's path that hold a text model, and moved between versions of transformers."""


def other_names(
    lacking: Collection[str], own: Collection[str], modules: Mapping[str, StoredModule]
) -> dict[str, str]:
    """Layers that an adapter lacks and seems to have by another name.

    Args:
        lacking: layers of the others.
        own: layers of its own that the others lack.
        modules: every layer's shapes.

    Returns:
        Its own name for each that is found, by the others' name.
    """
    found: dict[str, str] = {}
    for name in lacking:
        alike = [
            x for x in own if modules[x].layout == modules[name].layout and _same_layer(x, name)
        ]
        if len(alike) == 1:
            found[name] = alike[0]
    return found


def _same_layer(x: str, y: str) -> bool:
    ends = x.endswith(f".{y}") or y.endswith(f".{x}")
    return ends or _without_parts(x) == _without_parts(y)


def _without_parts(name: str) -> list[str]:
    return [part for part in name.split(".") if part not in _PARTS]
