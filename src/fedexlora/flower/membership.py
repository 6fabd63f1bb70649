"""Which nodes of a Flower federation are clients of a run, and under which names."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Message

from fedexlora.exchange.node_faults import fault_text
from fedexlora.exchange.untrusted import client_name, number, sentence
from fedexlora.flower.frames import from_records

_log = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 300.0
"""Seconds until a node whose greeting failed is greeted again; doubled every time."""
_chance = random.Random()
"""Nodes that failed together, as those that share a machine, are not greeted again together."""


@dataclass(slots=True)
class _Guest:
    """A node that is connected."""

    fault: str = "it has not answered yet"
    """Why it is not a client; empty for a client."""
    pause: float = 0.0
    """Seconds until it was greeted again, the last time; half as many more or less."""
    again: float | None = None
    """When it is greeted once more, if it is."""

    def postpone(self, fault: str) -> None:
        """Greet it once more after a while, which grows."""
        self.fault = fault
        self.pause = min(max(2 * self.pause, _FIRST_PAUSE), _LONGEST_PAUSE)
        self.again = time.monotonic() + self.pause * _chance.uniform(0.5, 1.5)


class Membership:
    """Nodes are greeted when they are seen first, and say their names.

    One that refuses is no client. Neither is one that has the name of another node while that is
    there: it is greeted again later, as a node that was started anew may be known by another id
    before Flower has missed the old one.

    Args:
        greet: push a greeting to a node; the id of its message, or None if Flower does not take it.
    """

    def __init__(self, greet: Callable[[int], str | None]) -> None:
        self._greet = greet
        self._guests: dict[int, _Guest] = {}
        self._greetings: dict[str, int] = {}
        self.nodes: dict[str, int] = {}
        """By client that was ever there, the node that it was last."""
        self.rows: dict[str, int] = {}
        """Training rows by client."""

    @property
    def greetings(self) -> Sequence[str]:
        """Messages that have no answer yet."""
        return list(self._greetings)

    @property
    def faults(self) -> list[str]:
        """Why nodes that are connected are no clients."""
        return [f"node {n}: {guest.fault}" for n, guest in self._guests.items() if guest.fault]

    def see(self, here: Iterable[int]) -> None:
        """Greet those of the connected nodes that are new, or whose greeting failed a while ago."""
        connected = set(here)
        for gone in self._guests.keys() - connected:
            del self._guests[gone]  # it is greeted again if it comes back
        for node in sorted(connected):
            guest = self._guests.get(node)
            if guest is not None and (guest.again is None or time.monotonic() < guest.again):
                continue
            pushed = self._greet(node)
            if pushed is not None:
                self._greetings[pushed] = node
                self._guests.setdefault(node, _Guest()).again = None

    def hear(self, message: Message) -> None:
        """Make a node that has answered a client of the run, or remember why not."""
        node = self._greetings.pop(message.metadata.reply_to_message_id)
        guest = self._guests.setdefault(node, _Guest())
        if message.has_error():  # it said nothing itself, as where its process was killed
            guest.postpone(f"it could not be greeted: {sentence(message.error.reason)}")
            _log.warning("node %d: %s", node, guest.fault)
            return
        try:
            header = from_records(message.content).header
            if "failure" in header:
                raise ValueError(fault_text(header["failure"]))
            client, rows = client_name(header, "client"), number(header, "rows")
        except ValueError as error:
            guest.fault = str(error)
            _log.warning("node %d is not part of the federation: %s", node, error)
            return
        holder = self.nodes.get(client)
        if holder not in (None, node) and holder in self._guests:
            guest.postpone(f"node {holder} is client {client!r} already")
            _log.warning("node %d: %s", node, guest.fault)
            return
        guest.fault = ""
        self.nodes[client] = node
        self.rows[client] = rows
        _log.info("node %d is client %r: %d rows", node, client, rows)
