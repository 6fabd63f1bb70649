"""All clients in this process, around one resident model."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from fedexlora.errors import RunError
from fedexlora.exchange.delivery import Delivery, Passage, open_message, with_own
from fedexlora.exchange.state import GlobalState
from fedexlora.local.clients import LocalClients
from fedexlora.local.memory import ClientMemory
from fedexlora.rounds.participation import late
from fedexlora.rounds.transport import ClientProgress, Reply

_log = logging.getLogger(__name__)


class InProcessTransport:
    """Clients one after the other.

    Messages are encoded, decoded and held against what clients hold as over a network. What they
    lead to is the server's own copy, as one process adds everything up once: what a client has of
    its own is its rows, and which version it is at.

    Args:
        trainer: trains any of the clients.
        held: by client, the version that it is at and its id, from before an interruption.
        keep_late: whether what comes after the deadline arrives in the next round, as it would
            over a network; else it is lost.
        memory: what clients remember of the method.
    """

    stateless = ()

    def __init__(
        self,
        trainer: LocalClients,
        *,
        held: Mapping[str, tuple[int, str]] | None = None,
        keep_late: bool = False,
        memory: ClientMemory | None = None,
    ) -> None:
        self._trainer = trainer
        self._held = dict(held or {})
        self._keep_late = keep_late
        self._memory = memory
        self._asked: deque[tuple[str, GlobalState | str]] = deque()
        self._scoring = False
        self._opened: dict[bytes, Passage] = {}
        self._late: list[Reply] = []

    @property
    def clients(self) -> Sequence[str]:
        """The clients in the order of the partition."""
        return tuple(self._trainer.num_examples)

    @property
    def waiting(self) -> Mapping[str, int]:
        """Clients whose update came after the deadline of the last round."""
        return {reply.client: reply.round for reply in self._late}

    def ask(self, round_: int, client: str, delivery: Delivery) -> None:
        """Bring the client to the version at once; training waits for :meth:`replies`."""
        del round_
        self._scoring = False
        self._bring(client, delivery)

    def ask_scores(self, round_: int, client: str, delivery: Delivery) -> None:
        """The same; scoring waits for :meth:`replies`."""
        del round_
        self._scoring = True
        self._bring(client, delivery)

    def _bring(self, client: str, delivery: Delivery) -> None:
        try:
            self._asked.append((client, self._land(client, delivery)))
        except RunError as error:
            self._asked.append((client, str(error)))

    def restore(self, client: str, state: GlobalState) -> None:
        """The client is at that version."""
        self._held[client] = state.version, state.id

    def replies(
        self, round_: int, deadline: float | None, progress: ClientProgress
    ) -> Iterator[Reply]:
        """Train one client after the other, each from its own adapter of its version."""
        arrived, self._late = self._late, []
        yield from arrived
        while self._asked:
            client, landed = self._asked.popleft()
            if isinstance(landed, str):
                yield Reply(client, round_, missed=landed)
                if self._asked and self._asked[-1][0] == client:
                    self._asked.rotate(1)  # asked again: it keeps its place in the sums
                continue
            reply = self._attempt(client, landed, round_, progress)
            if (why := late(reply.seconds, deadline)) and reply.message is not None:
                if self._keep_late:
                    self._late.append(reply)
                reply = Reply(client, round_, failure=why, seconds=reply.seconds)
            yield reply
        self._opened.clear()

    def _land(self, client: str, delivery: Delivery) -> GlobalState:
        """Check what leads to a version, once for all clients that get the same message."""
        passage = self._opened.get(delivery.message)
        if passage is None:
            passage = open_message(delivery.message, delivery.announced)
            self._opened[delivery.message] = passage
        passage.check(*self._held.pop(client, (None, None)))
        state = delivery.state
        self._held[client] = state.version, state.id
        return state if delivery.own is None else with_own(state, delivery.own, client, passage.own)

    def _attempt(
        self, client: str, held: GlobalState, round_: int, progress: ClientProgress
    ) -> Reply:
        started = time.perf_counter()
        message, failure = None, ""
        try:
            if self._scoring:
                message = self._trainer.report(client, held, self._memory)
            else:
                message = self._trainer.update(client, held, round_, progress, self._memory)
        except Exception as error:  # noqa: BLE001 - the boundary of a client: its faults are its own
            _log.debug("client %s failed in round %d", client, round_, exc_info=True)
            failure = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - started
        return Reply(client, round_, message, failure, seconds=seconds)
