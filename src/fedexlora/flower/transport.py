"""The engine's transport over Flower: requests are pushed, replies polled, nodes come and go."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedexlora import __version__
from fedexlora.engine.transport import ClientProgress, Reply
from fedexlora.errors import RunError
from fedexlora.flower.frames import PROTOCOL, Frame, from_records, to_records

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0
"""How often new nodes are looked for."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    poll: float = 0.5
    """Between two looks for replies."""
    ttl: float = 12 * 3600.0
    """After which a request that was not answered counts as lost."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that waits for its reply."""

    client: str
    round: int
    at: float


class FlowerTransport:
    """Clients are the nodes of a Flower federation, by the names that they give themselves.

    A node is greeted when it is seen first: it loads the recipe's model and its rows, and says its
    name. One that refuses, or has the name of another node that is there, is not part of the
    federation. A node that comes back under its name takes its place again.

    Args:
        grid: Flower's.
        recipe: what nodes are sent, from :func:`fedexlora.flower.node.recipe_for_nodes`.
        base: fingerprint of the server's base model.
        timing: how long is waited for what.
        keeps: whether nodes keep the version that they hold; simulated ones do not.
        in_order: hand on the updates of a round in the order in which their clients were asked.
    """

    def __init__(
        self,
        grid: Grid,
        recipe: Mapping[str, Any],
        base: str,
        *,
        timing: Timing | None = None,
        keeps: bool = True,
        in_order: bool = False,
    ) -> None:
        self._grid = grid
        self._recipe = recipe
        self._base = base
        self._timing = timing or Timing()
        self._keeps = keeps
        self._in_order = in_order
        self._nodes: dict[str, int] = {}
        self._greeted: dict[int, str] = {}
        self._greetings: dict[str, int] = {}
        self._asked: dict[str, _Asked] = {}
        self._answers: list[Reply] = []
        self._order: list[str] = []
        self._looked = float("-inf")
        self.rows: dict[str, int] = {}
        """Training rows by client."""

    @property
    def clients(self) -> Sequence[str]:
        """All clients that were ever there, by name."""
        return sorted(self._nodes)

    @property
    def waiting(self) -> Mapping[str, int]:
        """Clients that have not answered an earlier round."""
        return {asked.client: asked.round for asked in self._asked.values()}

    def gather(self, count: int, seconds: float) -> None:
        """Wait for nodes.

        Raises:
            RunError: if fewer than ``count`` were ready in time, naming those that refused.
        """
        ends = time.monotonic() + seconds
        while len(self._nodes) < count:
            if time.monotonic() > ends:
                raise RunError(
                    f"{len(self._nodes)} of {count} nodes were ready within {seconds:g} s",
                    [f"node {node}: {what}" for node, what in self._greeted.items() if what],
                )
            self._look()
            self._pull()
            time.sleep(self._timing.poll)

    def ask(self, round_: int, client: str, message: bytes, own: bytes | None) -> None:
        """Push the client's part of the round; what goes wrong is its reply."""
        parts = {"message": message} if own is None else {"message": message, "own": own}
        frame = self._frame("train", {"round": round_}, parts)
        if client not in self._order:
            self._order.append(client)
        pushed = self._push(self._nodes[client], MessageType.TRAIN, frame, str(round_))
        if pushed is None:
            failure = "its node is not connected"
            self._answers.append(Reply(client, round_, failure=failure, landed=False))
        else:
            self._asked[pushed] = _Asked(client, round_, time.monotonic())

    def replies(
        self, round_: int, deadline: float | None, progress: ClientProgress
    ) -> Iterator[Reply]:
        """Replies as they land, until all clients of the round have answered, or the deadline."""
        del progress  # a node's steps are in its own log
        started = time.monotonic()
        while True:
            self._look()
            self._pull()
            yield from self._take(round_)
            left = [asked for asked in self._asked.values() if asked.round == round_]
            if not left and not self._answers:
                break
            if deadline is not None and time.monotonic() - started > deadline:
                failure = f"late: no answer within the round's deadline, {deadline:g} s"
                self._answers += [
                    Reply(asked.client, round_, failure=failure, landed=False) for asked in left
                ]
                yield from self._take(round_)
                break
            if left:
                time.sleep(self._timing.poll)
        self._order.clear()

    def _take(self, round_: int) -> Iterator[Reply]:
        """Replies that may be handed on by now."""
        while found := next((reply for reply in self._answers if self._may(reply, round_)), None):
            self._answers.remove(found)
            if not found.missed and found.round == round_ and found.client in self._order:
                self._order.remove(found.client)
            yield found

    def _may(self, reply: Reply, round_: int) -> bool:
        if not self._in_order or reply.missed or reply.round != round_:
            return True
        return not self._order or reply.client == self._order[0] or reply.client not in self._order

    def _look(self) -> None:
        """Greet nodes that were not seen before."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        here = set(self._grid.get_node_ids())
        for node in sorted(here - set(self._greeted)):
            pushed = self._push(node, MessageType.QUERY, self._frame("hello", {}, {}), "hello")
            if pushed is not None:
                self._greeted[node] = "it has not answered yet"
                self._greetings[pushed] = node
        for node in set(self._greeted) - here:
            del self._greeted[node]  # it is greeted again if it comes back

    def _pull(self) -> None:
        """Take in what has arrived."""
        waiting = [*self._asked, *self._greetings]
        if not waiting:
            return
        for message in self._grid.pull_messages(waiting):
            key = message.metadata.reply_to_message_id
            if key in self._greetings:
                self._welcome(self._greetings.pop(key), message)
            elif key in self._asked:
                self._answers.append(self._reply(self._asked.pop(key), message))
        old = time.monotonic() - self._timing.ttl
        for key, asked in list(self._asked.items()):
            if asked.at < old:
                del self._asked[key]

    def _welcome(self, node: int, message: Message) -> None:
        """Make a node that has answered a client of the federation, or say why not."""
        if message.has_error():  # it said nothing itself, as where its process was killed
            self._greeted.pop(node, None)
            _log.warning("node %d could not be greeted: %s", node, message.error.reason)
            return
        try:
            header = _frame_of(message).header
            if "failure" in header:
                raise ValueError(str(header["failure"]))
            client, rows = str(header["client"]), int(header["rows"])
            holder = self._nodes.get(client)
            if holder not in (None, node) and holder in self._greeted:
                raise ValueError(f"node {holder} is client {client!r} already")
        except (ValueError, KeyError, TypeError) as error:
            self._greeted[node] = str(error)
            _log.warning("node %d is not part of the federation: %s", node, error)
            return
        self._greeted[node] = ""
        self._nodes[client] = node
        self.rows[client] = rows
        _log.info("node %d is client %r: %d rows", node, client, rows)

    def _reply(self, asked: _Asked, message: Message) -> Reply:
        client, round_ = asked.client, asked.round
        try:
            frame = _frame_of(message)
        except ValueError as error:
            return Reply(client, round_, failure=str(error), landed=False)
        if "missed" in frame.header:
            return Reply(client, round_, missed=str(frame.header["missed"]))
        if "failure" in frame.header or "update" not in frame.parts:
            failure = str(frame.header.get("failure", "its reply has no update"))
            return Reply(client, round_, failure=failure, landed=False)
        seconds = frame.header.get("seconds")
        spent = float(seconds) if isinstance(seconds, int | float) else 0.0
        update = frame.parts["update"]
        return Reply(client, round_, update, landed=self._keeps, seconds=spent)

    def _frame(self, kind: str, more: Mapping[str, Any], parts: Mapping[str, bytes]) -> Frame:
        said = {"kind": kind, "protocol": PROTOCOL, "fedexlora": __version__}
        return Frame({**said, "recipe": self._recipe, "base": self._base, **more}, parts)

    def _push(self, node: int, kind: str, frame: Frame, group: str) -> str | None:
        """Push one message; its id, or None if Flower does not take it."""
        content = to_records(frame)
        ttl = self._timing.ttl
        message = Message(content, node, kind, ttl=ttl, group_id=group)
        pushed = list(self._grid.push_messages([message]))
        return pushed[0] if pushed and pushed[0] else None


def _frame_of(message: Message) -> Frame:
    """A node's frame.

    Raises:
        ValueError: if Flower reports an error instead, or it is something else.
    """
    if message.has_error():
        raise ValueError(f"{message.error.reason or 'no reason given'} (code {message.error.code})")
    return from_records(message.content)
