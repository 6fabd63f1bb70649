"""What the header of a request to train says of the message in it."""

from __future__ import annotations

from fedexlora.errors import VersionError
from fedexlora.exchange.delivery import Announcement, Delivery
from fedexlora.exchange.digest import known_digest
from fedexlora.flower.frames import Frame


def announcing(delivery: Delivery) -> dict[str, str | None]:
    """What the header of a request says of its message."""
    return {"version": delivery.announced.id, "snapshot": delivery.announced.snapshot}


def announced(frame: Frame) -> Announcement:
    """What :func:`announcing` said.

    Raises:
        VersionError: if the header does not say it.
    """
    version, snapshot = frame.header.get("version"), frame.header.get("snapshot")
    try:
        known = None if snapshot is None else known_digest(snapshot)
        return Announcement(known_digest(version), known)
    except ValueError as error:
        raise VersionError(f"a request announces no version: {error}") from error
