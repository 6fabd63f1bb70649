"""Federations over Flower; the only importer of flwr.

What an app needs is loaded when it is first used. A run of a recipe over Flower:

    server_app       the server's app of a recipe
    client_app       a node's app

For people who have a Flower app of their own:

    FedExLoRA        a drop-in strategy, in FedAvg's place
    initial_arrays   what the strategy starts from
    load_arrays      a client's model becomes the global model
    update_arrays    what a client trained
    save_adapter     the final global model as one PEFT adapter
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "FedExLoRA",
    "client_app",
    "initial_arrays",
    "load_arrays",
    "save_adapter",
    "server_app",
    "update_arrays",
]

if TYPE_CHECKING:
    from fedexlora.flower.apps import client_app, server_app
    from fedexlora.flower.client import initial_arrays, load_arrays, save_adapter, update_arrays
    from fedexlora.flower.strategy import FedExLoRA

_HOMES = {
    "FedExLoRA": "fedexlora.flower.strategy",
    "client_app": "fedexlora.flower.apps",
    "server_app": "fedexlora.flower.apps",
    "initial_arrays": "fedexlora.flower.client",
    "load_arrays": "fedexlora.flower.client",
    "save_adapter": "fedexlora.flower.client",
    "update_arrays": "fedexlora.flower.client",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
