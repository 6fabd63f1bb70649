"""Federated LoRA fine-tuning whose aggregation is exact, and measured.

The functions for stored adapters are loaded when they are first used, so that importing the
package stays light:

    aggregate_adapters   the exact weighted mean of adapters, as one adapter
    compress_adapter     one adapter at a lower rank, optimally
    deviation            what averaging the factors of adapters would lose
    merge_adapter        an adapter merged into its base model's files
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "aggregate_adapters", "compress_adapter", "deviation", "merge_adapter"]

if TYPE_CHECKING:
    from fedexlora.adapters.aggregate import aggregate_adapters, compress_adapter
    from fedexlora.adapters.deviation import deviation
    from fedexlora.adapters.merge import merge_adapter

_HOMES = {
    "aggregate_adapters": "fedexlora.adapters.aggregate",
    "compress_adapter": "fedexlora.adapters.aggregate",
    "deviation": "fedexlora.adapters.deviation",
    "merge_adapter": "fedexlora.adapters.merge",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
