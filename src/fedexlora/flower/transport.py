"""The transport of rounds over Flower: requests are pushed, replies polled, nodes come and go."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedexlora import __version__
from fedexlora.errors import RunError
from fedexlora.exchange.delivery import Delivery
from fedexlora.exchange.node_faults import fault_text
from fedexlora.exchange.scores import LARGEST_REPORT
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.untrusted import seconds
from fedexlora.flower.agreement import Agreement
from fedexlora.flower.announcement import announcing
from fedexlora.flower.frames import (
    PROTOCOL,
    Bounds,
    Frame,
    error_text,
    from_records,
    to_records,
)
from fedexlora.flower.membership import Membership
from fedexlora.flower.names import Names
from fedexlora.rounds.participation import AccessList
from fedexlora.rounds.transport import ClientProgress, Reply

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0
"""How often new nodes are looked for, where some came or went a while ago."""
_POLL_SECONDS = 0.5
"""Between two looks for replies, where some came a while ago."""
_SLOWER, _LONGEST_LOOK, _LONGEST_POLL = 1.2, 6.0, 6.0
"""A pause in which nothing happened is followed by a longer one, up to so many times the first."""
_GREETINGS = 32
"""Answers to greetings that are pulled at once; updates, which are large, are pulled one by one."""
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
    node: int
    rows: int
    """Training rows that the client had declared by then."""
    round: int
    at: float
    frame: Frame | None
    """To be pushed again; None where its round is over."""
    size: int
    """Bytes of its parts."""
    answer: str
    """The part that its reply must have."""
    times: int = 1
    """How often it was pushed."""

    @property
    def resent(self) -> int:
        """Bytes of it that were pushed in vain."""
        return (self.times - 1) * self.size


class FlowerTransport:
    """Clients are the nodes of a Flower federation, by the names that they give themselves.

    A node that is greeted loads the recipe's model and its rows, and says its name.

    Args:
        grid: Flower's.
        recipe: what nodes are sent, from :func:`fedexlora.flower.node.recipe_for_nodes`.
        base: fingerprint of the server's base model; None where it has none, and nodes agree.
        largest_update: the most bytes that an update of any client may have.
        names: which node has which name; by default as where nodes are not authenticated.
        access: whom the recipe admits; by default everybody.
    """

    def __init__(
        self,
        grid: Grid,
        recipe: Mapping[str, Any],
        base: str | None,
        *,
        largest_update: int = 0,
        names: Names | None = None,
        access: AccessList | None = None,
    ) -> None:
        self.run = ""
        """The run's id, once its folder has one: requests to train carry it."""
        self._grid = grid
        self._recipe = recipe
        self._base = base
        self.agreement = Agreement()
        """On what nodes agree, where the server has no model."""
        self.expect(largest_update)
        self._members = Membership(
            self._greet,
            names or Names(),
            access or AccessList(),
            self.agreement if base is None else None,
        )
        self._asked: dict[str, _Asked] = {}
        self._answers: deque[Reply] = deque()
        self._round = 0
        self._looked = float("-inf")
        self._slower_look = self._slower_poll = 1.0

    def expect(self, largest_update: int) -> None:
        """Take answers of at most so many bytes to requests to train."""
        self._bounds = Bounds(parts={"update": largest_update, "report": LARGEST_REPORT})

    @property
    def rows(self) -> Mapping[str, int]:
        """Training rows by client."""
        return self._members.rows

    @property
    def clients(self) -> Sequence[str]:
        """The clients that are connected, by name."""
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
        while not self._complete(count):
            if time.monotonic() > ends:
                raise RunError(
                    f"{len(self.clients)} of {count} nodes were ready within {wait:g} s",
                    self._members.faults,
                )
            self._look()
            heard = sum(1 for _ in self._pull())
            if len(self.clients) < count:
                self._pause(heard, ends)

    def _complete(self, count: int) -> bool:
        """Whether enough nodes are clients, and agree on the run's beginning if they have to.

        Those that do not agree are clients no more.
        """
        if len(self.clients) >= count and self._base is None:
            for client, fault in self.agreement.settle().items():
                self._members.refuse(client, fault)
            self._base = self.agreement.settled.base if self.agreement.settled else None
        return len(self.clients) >= count

    def fetch_origin(self, client: str, size: int, wait: float) -> bytes:
        """Have a client send the run's beginning.

        Args:
            client: one that has stated it.
            size: its bytes, as stated.
            wait: for how many seconds.

        Raises:
            ValueError: if it sends something else, or nothing.
        """
        node = self._members.nodes.get(client)
        pushed = None
        if node is not None:
            pushed = self._push(node, MessageType.QUERY, self._frame("origin", {}, {}), "origin")
        ends = time.monotonic() + wait
        while pushed is not None and time.monotonic() < ends:
            for message in self._grid.pull_messages([pushed]):
                if message.has_error():
                    raise ValueError(error_text(message.error))
                frame = from_records(message.content, Bounds(parts={"origin": size}))
                if "failure" in frame.header:
                    raise ValueError(fault_text(frame.header["failure"]))
                if "origin" not in frame.parts:
                    raise ValueError("its reply has no version 0")
                return frame.parts["origin"]
            time.sleep(_POLL_SECONDS)
        raise ValueError("it has not answered")

    @property
    def stateless(self) -> Collection[str]:
        """The clients that said of themselves that they keep nothing."""
        return self._members.stateless

    def ask(self, round_: int, client: str, delivery: Delivery) -> None:
        """Push the client's part of the round; what goes wrong is its reply."""
        self._request("train", "update", round_, client, delivery)

    def ask_scores(self, round_: int, client: str, delivery: Delivery) -> None:
        """The same, for scores of the version alone."""
        self._request("score", "report", round_, client, delivery)

    def _request(
        self, kind: str, answer: str, round_: int, client: str, delivery: Delivery
    ) -> None:
        parts = {"message": delivery.message}
        if delivery.own is not None:
            parts["own"] = delivery.own
        more = {"run": self.run, "round": round_, **announcing(delivery)}
        frame = self._frame(kind, more, parts)
        if round_ != self._round:  # a request of an earlier round is not pushed again
            self._asked = {k: replace(asked, frame=None) for k, asked in self._asked.items()}
        self._round = round_
        node = self._members.nodes.get(client)
        pushed = None
        if node is not None:
            pushed = self._push(node, MessageType.TRAIN, frame, str(round_))
        if node is None or pushed is None:
            failure = "its node is not connected"
            self._answers.append(Reply(client, round_, failure=failure, landed=False))
        else:
            rows = self._members.rows[client]
            size = sum(map(len, parts.values()))
            asked = _Asked(client, node, rows, round_, time.monotonic(), frame, size, answer)
            self._asked[pushed] = asked

    def restore(self, client: str, state: GlobalState) -> None:
        """Nothing: what nodes hold is on their own disks."""

    def replies(
        self, round_: int, deadline: float | None, progress: ClientProgress
    ) -> Iterator[Reply]:
        """Replies as they land, until all clients of the round have answered, or the deadline."""
        del progress  # a node's steps are in its own log
        ends = float("inf") if deadline is None else time.monotonic() + deadline
        while True:
            self._look()
            heard = 0
            for _ in self._pull():
                heard += 1
                yield from self._take()  # before the next one is pulled: they are large
            yield from self._take()
            left = [asked for asked in self._asked.values() if asked.round == round_]
            if not left and not self._answers:
                break
            if time.monotonic() > ends:
                failure = f"late: no answer within the round's deadline, {deadline:g} s"
                self._answers += [
                    Reply(asked.client, round_, failure=failure, landed=False) for asked in left
                ]
                yield from self._take()
                break
            if left:
                self._pause(heard, ends)

    def _take(self) -> Iterator[Reply]:
        """Replies that have come, also those that come while these are looked at."""
        while self._answers:
            yield self._answers.popleft()

    def _pause(self, heard: int, ends: float) -> None:
        """Wait before the next look for replies, but not beyond a time."""
        self._slower_poll = 1.0 if heard else min(self._slower_poll * _SLOWER, _LONGEST_POLL)
        left = max(0.0, ends - time.monotonic())
        time.sleep(min(self._slower_poll * _POLL_SECONDS, left))

    def _look(self) -> None:
        """Look for nodes, every now and then, and greet those that are due."""
        if time.monotonic() - self._looked >= self._slower_look * _LOOK_SECONDS:
            changed = self._members.see(
                {n.node_id: _identity(n.node_id, n.public_key) for n in self._grid.get_nodes()}
            )
            self._looked = time.monotonic()
            slower = min(self._slower_look * _SLOWER, _LONGEST_LOOK)
            self._slower_look = 1.0 if changed else slower
        self._members.greet()

    def _greet(self, node: int) -> str | None:
        return self._push(node, MessageType.QUERY, self._frame("hello", {}, {}), "hello")

    def _pull(self) -> Iterator[None]:
        """Take in what has arrived; comes back after every message."""
        greetings = self._members.greetings
        batches = [greetings[i : i + _GREETINGS] for i in range(0, len(greetings), _GREETINGS)]
        for batch in [*batches, *([key] for key in list(self._asked))]:
            messages = list(self._grid.pull_messages(batch))
            while messages:
                self._hear(messages.pop(0))  # what Flower made of it is gone before it is used
                yield
        old = time.monotonic() - _TTL_SECONDS
        for key in [key for key, asked in self._asked.items() if asked.at < old]:
            lost, failure = self._asked.pop(key), f"lost: no answer within {_TTL_SECONDS:g} s"
            self._answers.append(Reply(lost.client, lost.round, failure=failure, landed=False))

    def _hear(self, message: Message) -> None:
        """One message: an answer to a greeting, or to a request."""
        key = message.metadata.reply_to_message_id
        if key in self._asked:
            asked = self._asked.pop(key)
            if self._repeated(asked, message):
                return
            reply = self._reply(asked, message)
            if reply.message is not None:  # an error may be Flower's, of a lost node
                _log.info("round %d: %s has answered", asked.round, asked.client)
            self._answers.append(replace(reply, rows=asked.rows, resent=asked.resent))
        else:
            self._members.hear(message)

    def _repeated(self, asked: _Asked, message: Message) -> bool:
        """Ask once more, where only the process that Flower started for the message was lost.

        The node's worker answers a request that it has answered already without training again.
        """
        if not message.has_error() or message.error.code != _PROCESS_LOST:
            return False
        if asked.times == _TIMES or asked.frame is None:
            return False
        pushed = self._push(asked.node, MessageType.TRAIN, asked.frame, str(asked.round))
        if pushed is None:
            return False
        _log.warning("%s is asked again: %s", asked.client, error_text(message.error))
        self._asked[pushed] = replace(asked, times=asked.times + 1)
        return True

    def _reply(self, asked: _Asked, message: Message) -> Reply:
        client, round_ = asked.client, asked.round
        try:
            if message.has_error():
                raise ValueError(error_text(message.error))
            frame = from_records(message.content, self._bounds)
            if "missed" in frame.header:
                return Reply(client, round_, missed=fault_text(frame.header["missed"]))
            if "failure" in frame.header:
                raise ValueError(fault_text(frame.header["failure"]))
            if asked.answer not in frame.parts:
                raise ValueError(f"its reply has no {asked.answer}")
            spent = seconds(frame.header, "seconds")
        except ValueError as error:
            return Reply(client, round_, failure=str(error), landed=False)
        keeps = frame.header.get("keeps") is not False
        return Reply(client, round_, frame.parts[asked.answer], landed=keeps, seconds=spent)

    def _frame(self, kind: str, more: Mapping[str, Any], parts: Mapping[str, bytes]) -> Frame:
        said = {"kind": kind, "protocol": PROTOCOL, "fedexlora": __version__}
        return Frame({**said, "recipe": self._recipe, "base": self._base, **more}, parts)

    def _push(self, node: int, kind: str, frame: Frame, group: str) -> str | None:
        """Push one message; its id, or None if Flower does not take it."""
        content = to_records(frame)
        message = Message(content, node, kind, ttl=_TTL_SECONDS, group_id=group)
        pushed = list(self._grid.push_messages([message]))
        return pushed[0] if pushed and pushed[0] else None


def _identity(node: int, key: bytes) -> str:
    """What tells a node from others: a digest of its key; its id, where Flower tells no key."""
    return f"sha256:{hashlib.sha256(key).hexdigest()}" if key else f"node {node}"
