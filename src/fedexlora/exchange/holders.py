"""What holders of a model say of it: their half of the certificate, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from fedexlora.exchange.records import HolderRecord, HoldersRecord
from fedexlora.exchange.untrusted import short

_KEYS = tuple(HolderRecord.model_fields)
_NULL = ("kept", "kept_error")
"""What is not measured where there is no remainder."""


def holder_from(found: object) -> tuple[HolderRecord | None, list[str]]:
    """Figures that somebody else sent.

    Args:
        found: what a header holds; anything that JSON holds.

    Returns:
        The figures, or None with every fault.
    """
    if not isinstance(found, dict) or found.keys() != set(_KEYS):
        return None, [f"holder: expected {sorted(_KEYS)}, found {short(found)}"]
    faults = [
        f"holder: {key}: expected a finite number, found {short(value)}"
        for key, value in found.items()
        if not (value is None and key in _NULL) and not _is_figure(key, value)
    ]
    return (None, faults) if faults else (HolderRecord(**found), [])


def worst_of(version: int, holders: Mapping[str, HolderRecord]) -> HoldersRecord:
    """The worst of what holders of one version say of their models.

    Args:
        version: the version.
        holders: by client, at least one; of equal ones the first by name is named.
    """
    names = sorted(holders)
    worst = max(names, key=lambda name: holders[name].bound / holders[name].allowed)
    forward = max(names, key=lambda name: holders[name].forward)
    kept = [name for name in names if holders[name].kept is not None]
    least = max(kept, key=lambda name: abs((holders[name].kept or 0.0) - 1.0), default=None)
    return HoldersRecord(
        version=version,
        clients=len(names),
        worst_client=worst,
        error=holders[worst].error,
        bound=holders[worst].bound,
        allowed=holders[worst].allowed,
        worst_forward_client=forward,
        forward=holders[forward].forward,
        worst_kept_client=least,
        kept=None if least is None else holders[least].kept,
        kept_error=None if least is None else holders[least].kept_error,
        held=all(x.bound <= x.allowed for x in holders.values()),
    )


def _is_figure(key: str, value: object) -> bool:
    if type(value) is not float or not isfinite(value):
        return False
    return key == "kept" or (value > 0.0 if key == "allowed" else value >= 0.0)
