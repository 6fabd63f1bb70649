"""All clients in this process, around one resident model."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from fedexlora.engine.local import LocalTrainer
from fedexlora.engine.participation import late
from fedexlora.engine.transport import ClientProgress, Reply
from fedexlora.errors import RunError
from fedexlora.exchange.shipment import receive, receive_own
from fedexlora.exchange.state import GlobalState

_log = logging.getLogger(__name__)


class InProcessTransport:
    """Clients one after the other.

    Messages are encoded and decoded as over a network. Clients that hold the same version hold the
    same bits, so that one copy of each version serves them all: what a client has of its own is
    its rows. As many versions are kept as the server has pieces for; a client of an older one gets
    the total, as it would over a network.

    Args:
        trainer: trains any of the clients.
        held: versions by client, from before an interruption.
        versions: those versions.
        window: how many versions are kept.
        keep_late: whether what comes after the deadline arrives in the next round, as it would
            over a network; else it is lost.
    """

    def __init__(
        self,
        trainer: LocalTrainer,
        *,
        held: Mapping[str, int] | None = None,
        versions: Mapping[int, GlobalState] | None = None,
        window: int = 1,
        keep_late: bool = False,
    ) -> None:
        self._trainer = trainer
        self._held = dict(held or {})
        self._versions = {v: state.common() for v, state in (versions or {}).items()}
        self._window = window
        self._keep_late = keep_late
        self._asked: deque[tuple[str, GlobalState | str]] = deque()
        self._decoded: list[tuple[bytes, GlobalState]] = []
        self._late: list[Reply] = []

    @property
    def clients(self) -> Sequence[str]:
        """The clients in the order of the partition."""
        return tuple(self._trainer.num_examples)

    @property
    def waiting(self) -> Mapping[str, int]:
        """Clients whose update came after the deadline of the last round."""
        return {reply.client: reply.round for reply in self._late}

    def ask(self, round_: int, client: str, message: bytes, own: bytes | None) -> None:
        """Bring the client to the version at once; training waits for :meth:`replies`."""
        del round_
        try:
            self._asked.append((client, self._land(client, message, own)))
        except RunError as error:
            self._asked.append((client, str(error)))

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
        self._decoded.clear()

    def _land(self, client: str, message: bytes, own: bytes | None) -> GlobalState:
        """Decode a message, once for all clients that get the same one."""
        held = self._versions.get(self._held.pop(client, -1))
        state = next((state for known, state in self._decoded if known == message), None)
        if state is None:
            state = receive(held, message)
            self._decoded.append((message, state))
        landed = receive_own(state, client, own) if own is not None else state
        self._versions[state.version] = state
        self._held[client] = state.version
        oldest = state.version - self._window
        self._versions = {v: x for v, x in self._versions.items() if v >= oldest}
        return landed

    def _attempt(
        self, client: str, held: GlobalState, round_: int, progress: ClientProgress
    ) -> Reply:
        started = time.perf_counter()
        message, failure = None, ""
        try:
            message = self._trainer.update(client, held, round_, progress)
        except Exception as error:  # noqa: BLE001 - the boundary of a client: its faults are its own
            _log.debug("client %s failed in round %d", client, round_, exc_info=True)
            failure = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - started
        return Reply(client, round_, message, failure, seconds=seconds)
