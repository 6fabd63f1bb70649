"""Whose code runs a run, and where: what may change its numbers without being in its recipe."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from fedexlora import __version__
from fedexlora.local.threads import describe_threads

if TYPE_CHECKING:  # it needs PEFT
    from fedexlora.peft_bridge.model import AdaptedModel

_PACKAGES = ("torch", "transformers", "peft", "datasets", "flwr-datasets", "safetensors")


def device_of(model: AdaptedModel) -> torch.device:
    """The one device that a model is on, trained and scored."""
    device: torch.device = next(model.peft_model.parameters()).device
    return device


def describe_environment(model: AdaptedModel | None) -> dict[str, Any]:
    """Versions and machine of this process, for ``run.json``.

    Args:
        model: the server's model, trained and scored on one device; None where it has none.
    """
    device = None if model is None else device_of(model)
    return {
        "fedexlora": __version__,
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": {
            "python": platform.python_version(),
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            **describe_threads(),
            "cuda": torch.cuda.get_device_name(device)
            if device and device.type == "cuda"
            else None,
            "device": str(device) if device else None,
        },
    }


def _version(package: str) -> str | None:
    """A server without a model needs few of them."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment_changes(header: Mapping[str, Any], model: AdaptedModel | None) -> list[str]:
    """In what this process differs from the one that ran the rounds so far.

    Of the machine it is the device alone: that a run moved is no news to whoever moved it.

    Args:
        header: the run's.
        model: the model of this process.
    """
    here, there = describe_environment(model), (header.get("resumed") or [header])[-1]
    pairs = {"fedexlora": (there.get("fedexlora"), here["fedexlora"])}
    for table, keys in (("packages", _PACKAGES), ("machine", ("device",))):
        held = there.get(table) or {}
        pairs |= {key: (held.get(key), here[table][key]) for key in keys}
    return [f"{key} {old} there, {new} here" for key, (old, new) in pairs.items() if old != new]


def resumed_header(
    header: Mapping[str, Any], finished: int, model: AdaptedModel | None
) -> dict[str, Any]:
    """The header with what the run goes on with, beside what it was started with.

    Args:
        header: the run's.
        finished: the last round that was run before.
        model: the model of this process.
    """
    before = header.get("resumed", ())
    return {
        **header,
        "resumed": [*before, {"after_round": finished, **describe_environment(model)}],
    }
