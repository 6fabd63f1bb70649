"""The engine's transport over Flower: requests are pushed, replies polled, nodes come and go."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedexlora import __version__
from fedexlora.engine.transport import ClientProgress, Reply
from fedexlora.errors import RunError
from fedexlora.exchange.node_faults import fault_text
from fedexlora.exchange.untrusted import seconds, sentence
from fedexlora.flower.frames import PROTOCOL, Frame, from_records, to_records
from fedexlora.flower.membership import Membership

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0
"""How often new nodes are looked for."""
_POLL_SECONDS = 0.5
"""Between two looks for replies."""
_TTL_SECONDS = 12 * 3600.0
"""After which a request that was not answered counts as lost; Flower keeps it no longer, either."""

_PROCESS_LOST = 8
"""Flower's code for a node's process that did not start in time, or stopped; it is not public."""
_TIMES = 5
"""How often a request is pushed before the client counts as failed."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that waits for its reply."""

    client: str
    round: int
    at: float
    frame: Frame
    times: int = 1
    """How often it was pushed."""

    @property
    def resent(self) -> int:
        """Bytes of it that were pushed in vain."""
        return (self.times - 1) * sum(map(len, self.frame.parts.values()))


class FlowerTransport:
    """Clients are the nodes of a Flower federation, by the names that they give themselves.

    A node that is greeted loads the recipe's model and its rows, and says its name.

    Args:
        grid: Flower's.
        recipe: what nodes are sent, from :func:`fedexlora.flower.node.recipe_for_nodes`.
        base: fingerprint of the server's base model.
        in_order: hand on the updates of a round in the order in which their clients were asked.
    """

    def __init__(
        self,
        grid: Grid,
        recipe: Mapping[str, Any],
        base: str,
        *,
        in_order: bool = False,
    ) -> None:
        self._grid = grid
        self._recipe = recipe
        self._base = base
        self._in_order = in_order
        self._members = Membership(self._greet)
        self._asked: dict[str, _Asked] = {}
        self._answers: list[Reply] = []
        self._order: list[str] = []
        self._round = 0
        self._looked = float("-inf")

    @property
    def rows(self) -> Mapping[str, int]:
        """Training rows by client."""
        return self._members.rows

    @property
    def clients(self) -> Sequence[str]:
        """All clients that were ever there, by name."""
        return sorted(self._members.nodes)

    @property
    def waiting(self) -> Mapping[str, int]:
        """Clients that have not answered an earlier round."""
        return {asked.client: asked.round for asked in self._asked.values()}

    def gather(self, count: int, wait: float) -> None:
        """Wait for nodes.

        Raises:
            RunError: if fewer than ``count`` were ready in time, naming those that refused.
        """
        ends = time.monotonic() + wait
        while len(self.clients) < count:
            if time.monotonic() > ends:
                raise RunError(
                    f"{len(self.clients)} of {count} nodes were ready within {wait:g} s",
                    self._members.faults,
                )
            self._look()
            self._pull()
            time.sleep(_POLL_SECONDS)

    def ask(self, round_: int, client: str, message: bytes, own: bytes | None) -> None:
        """Push the client's part of the round; what goes wrong is its reply."""
        parts = {"message": message} if own is None else {"message": message, "own": own}
        frame = self._frame("train", {"round": round_}, parts)
        self._round = round_
        if client not in self._order:
            self._order.append(client)
        pushed = self._push(self._members.nodes[client], MessageType.TRAIN, frame, str(round_))
        if pushed is None:
            failure = "its node is not connected"
            self._answers.append(Reply(client, round_, failure=failure, landed=False))
        else:
            self._asked[pushed] = _Asked(client, round_, time.monotonic(), frame)

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
                time.sleep(_POLL_SECONDS)
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
        """Look for nodes, every now and then."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        self._members.see(self._grid.get_node_ids())

    def _greet(self, node: int) -> str | None:
        return self._push(node, MessageType.QUERY, self._frame("hello", {}, {}), "hello")

    def _pull(self) -> None:
        """Take in what has arrived."""
        waiting = [*self._asked, *self._members.greetings]
        if not waiting:
            return
        for message in self._grid.pull_messages(waiting):
            key = message.metadata.reply_to_message_id
            if key in self._asked:
                asked = self._asked.pop(key)
                if not self._repeated(asked, message):
                    reply = self._reply(asked, message)
                    if reply.message is not None:  # an error may be Flower's, of a lost node
                        _log.info("round %d: %s has answered", asked.round, asked.client)
                    self._answers.append(replace(reply, resent=asked.resent))
            elif key in self._members.greetings:
                self._members.hear(message)
        old = time.monotonic() - _TTL_SECONDS
        for key in [key for key, asked in self._asked.items() if asked.at < old]:
            lost, failure = self._asked.pop(key), f"lost: no answer within {_TTL_SECONDS:g} s"
            self._answers.append(Reply(lost.client, lost.round, failure=failure, landed=False))

    def _repeated(self, asked: _Asked, message: Message) -> bool:
        """Ask once more, where only the process that Flower started for the message was lost.

        The node's worker answers a request that it has answered already without training again.
        """
        if not message.has_error() or message.error.code != _PROCESS_LOST:
            return False
        if asked.times == _TIMES or asked.round != self._round:
            return False
        node = self._members.nodes[asked.client]
        pushed = self._push(node, MessageType.TRAIN, asked.frame, str(asked.round))
        if pushed is None:
            return False
        _log.warning("%s is asked again: %s", asked.client, sentence(message.error.reason))
        self._asked[pushed] = replace(asked, times=asked.times + 1)
        return True

    def _reply(self, asked: _Asked, message: Message) -> Reply:
        client, round_ = asked.client, asked.round
        try:
            frame = _frame_of(message)
            if "missed" in frame.header:
                return Reply(client, round_, missed=fault_text(frame.header["missed"]))
            if "failure" in frame.header:
                raise ValueError(fault_text(frame.header["failure"]))
            if "update" not in frame.parts:
                raise ValueError("its reply has no update")
            spent = seconds(frame.header, "seconds")
        except ValueError as error:
            return Reply(client, round_, failure=str(error), landed=False)
        keeps = frame.header.get("keeps") is not False
        return Reply(client, round_, frame.parts["update"], landed=keeps, seconds=spent)

    def _frame(self, kind: str, more: Mapping[str, Any], parts: Mapping[str, bytes]) -> Frame:
        said = {"kind": kind, "protocol": PROTOCOL, "fedexlora": __version__}
        return Frame({**said, "recipe": self._recipe, "base": self._base, **more}, parts)

    def _push(self, node: int, kind: str, frame: Frame, group: str) -> str | None:
        """Push one message; its id, or None if Flower does not take it."""
        content = to_records(frame)
        message = Message(content, node, kind, ttl=_TTL_SECONDS, group_id=group)
        pushed = list(self._grid.push_messages([message]))
        return pushed[0] if pushed and pushed[0] else None


def _frame_of(message: Message) -> Frame:
    """A node's frame.

    Raises:
        ValueError: if Flower reports an error instead, or it is something else.
    """
    if message.has_error():
        reason = sentence(message.error.reason or "no reason given")
        raise ValueError(f"{reason} (code {message.error.code})")
    return from_records(message.content)
