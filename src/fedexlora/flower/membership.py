"""Which nodes of a Flower federation are clients of a run, and under which names."""

from __future__ import annotations

import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message

from fedexlora.exchange.node_faults import fault_text
from fedexlora.exchange.untrusted import client_name, number
from fedexlora.flower.agreement import Agreement
from fedexlora.flower.frames import Bounds, error_text, from_records
from fedexlora.flower.names import Names
from fedexlora.peft_bridge.origin import Statement
from fedexlora.rounds.participation import AccessList
from fedexlora.texts import outside

_log = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 300.0
"""Seconds until a node whose greeting failed is greeted again; doubled every time."""
_IN_FLIGHT = 256
"""Greetings that wait for an answer at a time."""
_PATIENCE = 600.0
"""Seconds after which a greeting that was not answered no longer holds up the next one; a node
loads its model before it answers."""
_LINES = 500
"""Lines of the log about nodes that are no clients: whoever comes and goes does not fill it."""
_BOUNDS = Bounds()
_chance = random.Random()
"""Nodes that failed together, as those that share a machine, are not greeted again together."""


@dataclass(slots=True)
class _Guest:
    """A node that is connected."""

    key: str
    """What tells it from others when it comes back."""
    fault: str = "it has not answered yet"
    """Why it is not a client; empty for a client."""
    pause: float = 0.0
    """Seconds until it was greeted again, the last time; half as many more or less."""
    again: float | None = 0.0
    """When it is greeted, if it is."""
    greeting: str | None = None
    """The message that waits for its answer."""
    client: str = ""
    """Its name, if it is a client."""

    def postpone(self, fault: str) -> None:
        """Greet it once more after a while, which grows."""
        self.fault = fault
        self.pause = min(max(2 * self.pause, _FIRST_PAUSE), _LONGEST_PAUSE)
        self.again = time.monotonic() + self.pause * _chance.uniform(0.5, 1.5)


class Membership:
    """Nodes are greeted when they are seen first, and say their names.

    One that refuses is no client. Neither is one that is another client already, has a name that
    belongs to another node, or that ``[federation]`` does not admit. One that has the name of a
    node which is still there is greeted again later, as a node that was started anew may be known
    by another id before Flower has missed the old one. A client that is no longer connected is
    none until it comes back and says its name, with its rows, again.

    Args:
        greet: push a greeting to a node; the id of its message, or None if Flower does not take it.
        names: which node has which name.
        access: whom the recipe admits.
        agreement: on what nodes agree, where the server has no model.
    """

    def __init__(
        self,
        greet: Callable[[int], str | None],
        names: Names,
        access: AccessList,
        agreement: Agreement | None = None,
    ) -> None:
        self._greet = greet
        self._names = names
        self._access = access
        self._agreement = agreement
        self._guests: dict[int, _Guest] = {}
        self._greetings: dict[str, tuple[int, float]] = {}
        self._lines = 0
        self.nodes: dict[str, int] = {}
        """By client, its node."""
        self.rows: dict[str, int] = {}
        """By client, the training rows that it has declared."""
        self.stateless: set[str] = set()
        """Clients that keep nothing from one request to the next."""

    @property
    def greetings(self) -> Sequence[str]:
        """Messages that have no answer yet."""
        return list(self._greetings)

    @property
    def faults(self) -> list[str]:
        """Why nodes that are connected are no clients: one line for those of one reason."""
        nodes: dict[str, list[int]] = defaultdict(list)
        for node, guest in self._guests.items():
            if guest.fault:
                nodes[guest.fault].append(node)
        return [
            f"node {', '.join(map(str, found[:3]))}"
            f"{f' and {len(found) - 3} more' if len(found) > 3 else ''}: {fault}"
            for fault, found in nodes.items()
        ]

    def see(self, here: Mapping[int, str]) -> bool:
        """Take note of the connected nodes, by id with their keys; whether any came or went."""
        gone = [node for node in self._guests if node not in here]
        for node in gone:
            self._forget(node)
        new = [node for node in here if node not in self._guests]
        self._guests |= {node: _Guest(here[node]) for node in new}
        return bool(gone or new)

    def greet(self) -> None:
        """Greet nodes that are new, or whose greeting failed a while ago; not too many at once."""
        now = time.monotonic()
        waiting = sum(now - since < _PATIENCE for _, since in self._greetings.values())
        due = (n for n, g in self._guests.items() if g.again is not None and g.again <= now)
        for node in sorted(due)[: max(0, _IN_FLIGHT - waiting)]:
            pushed = self._greet(node)
            if pushed is not None:
                self._greetings[pushed] = node, now
                self._guests[node].again, self._guests[node].greeting = None, pushed

    def hear(self, message: Message) -> None:
        """Make a node that has answered a client of the run, or remember why not."""
        node, _ = self._greetings.pop(message.metadata.reply_to_message_id, (None, 0.0))
        if node is None:  # it went meanwhile
            return
        guest = self._guests[node]
        guest.greeting = None
        if message.has_error():  # it said nothing itself, as where its process was killed
            guest.postpone(f"it could not be greeted: {error_text(message.error)}")
            self._warn(f"node {node}: {guest.fault}")
            return
        try:
            client, rows, keeps, stated = _introduction(message, self._agreement is not None)
            fault = self._access.fault(client) or self._names.fault(client, guest.key)
            if not fault and self._agreement is not None and stated is not None:
                fault = self._agreement.fault(stated)
            if fault:
                raise ValueError(fault)
        except ValueError as error:
            guest.fault = str(error)
            self._warn(f"node {node} is not part of the federation: {guest.fault}")
            return
        holder = self.nodes.get(client)
        if holder is not None and holder != node:
            guest.postpone(f"node {holder} is client {client!r} already")
            self._warn(f"node {node}: {guest.fault}")
            return
        self._names.take(client, guest.key)
        if self._agreement is not None and stated is not None:
            self._agreement.stated[client] = stated
        guest.fault, guest.client = "", client
        self.nodes[client], self.rows[client] = node, rows
        (self.stateless.discard if keeps else self.stateless.add)(client)
        _log.info("node %d is client %r: %d rows", node, client, rows)

    def refuse(self, client: str, fault: str) -> None:
        """Have a client be none any more."""
        guest = self._guests[self.nodes.pop(client)]
        del self.rows[client]
        guest.fault, guest.client = fault, ""
        self._warn(f"client {client!r} is not part of the federation: {fault}")

    def _forget(self, node: int) -> None:
        """A node has gone; it is greeted again if it comes back."""
        guest = self._guests.pop(node)
        if guest.greeting is not None:
            del self._greetings[guest.greeting]
        if guest.client:
            del self.nodes[guest.client], self.rows[guest.client]
            if self._agreement is not None:
                self._agreement.stated.pop(guest.client, None)
            _log.info("client %r is no longer connected", guest.client)

    def _warn(self, line: str) -> None:
        self._lines += 1
        if self._lines <= _LINES:
            _log.warning("%s", line)
        elif self._lines == _LINES + 1:
            _log.warning("more such nodes are not named here")


def _introduction(message: Message, states: bool) -> tuple[str, int, bool, Statement | None]:
    """What a node says of itself: its client's name and rows, whether it keeps versions, its model.

    Args:
        message: its answer to a greeting.
        states: whether it must state its model.

    Raises:
        ValueError: why it is no client, in words of ours.
    """
    try:
        header = from_records(message.content, _BOUNDS).header
        if "failure" in header:
            raise ValueError(fault_text(header["failure"]))
        keeps = header.get("keeps") is not False
        stated = Statement.read(header.get("origin")) if states else None
        return client_name(header, "client"), number(header, "rows"), keeps, stated
    except ValueError as error:
        raise ValueError(outside(str(error))) from error
