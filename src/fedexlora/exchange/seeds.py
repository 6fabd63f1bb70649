"""Randomness as a function of (seed, round, client), never of what happened before."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, round_: int, client: str) -> int:
    """The seed of one client's local training in one round, in ``[0, 2**31)``."""
    digest = hashlib.sha256(f"{seed}/{round_}/{client}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % 2**31
