"""After the last round: its clients come to the final version, and score it.

Clients score a version when they land on it, before they train from it. Nobody trains from the
final one, so that those of the last round are asked for that alone, once more. What they hold then
is not part of the store: a run that is continued is the one that was never stopped, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from fedexlora.errors import RunError, UpdateError
from fedexlora.exchange.delivery import deliver
from fedexlora.exchange.history import Holdings
from fedexlora.exchange.records import BytesRecord, FinishedClient, FinishRecord, LeftOutRecord
from fedexlora.exchange.scores import decode_report, taken_together
from fedexlora.exchange.state import GlobalState
from fedexlora.rounds.transport import Reply, Transport


@dataclass(slots=True)
class Finish:
    """Brings clients to the final version, and takes in their scores.

    Args:
        transport: how clients are reached.
        state: the final version.
        holdings: what clients hold.
        base: fingerprint of the base model.
        metrics: what clients score by.
        deadline: seconds until those that have not answered are left out; None for none.
    """

    transport: Transport
    state: GlobalState
    holdings: Holdings
    base: str
    metrics: Collection[str]
    deadline: float | None = None
    _downloads: dict[str, int] = field(default_factory=dict)
    _lost: set[str] = field(default_factory=set)
    _clients: dict[str, FinishedClient] = field(default_factory=dict)
    _left_out: dict[str, LeftOutRecord] = field(default_factory=dict)

    def record(self, clients: Collection[str]) -> FinishRecord:
        """Ask clients, and say what came of it; a client that fails is left out by name.

        Args:
            clients: those of the last round, in the order of its draw.
        """
        started, round_ = time.perf_counter(), self.state.version + 1
        for client in clients:
            self._send(client, self.holdings.versions.get(client))
        for reply in self.transport.replies(round_, self.deadline, lambda *_: None):
            if reply.round == round_ and reply.client in self._downloads:
                self._hear(reply)
        for client in clients:
            if client not in self._clients and client not in self._left_out:
                self._leave_out(client, ["it did not answer"], 0)
        found = tuple(self._clients[x] for x in clients if x in self._clients)
        lost = tuple(self._left_out[x] for x in clients if x in self._left_out)
        scores = [client.scores for client in found]
        up = sum(x.uploaded_bytes for x in found) + sum(x.uploaded_bytes for x in lost)
        return FinishRecord(
            version=self.state.version,
            clients=found,
            left_out=lost,
            bytes=BytesRecord(up=up, down=sum(self._downloads.values())),
            scores=taken_together(self.state.version, scores) if scores else None,
            seconds=time.perf_counter() - started,
        )

    def _send(self, client: str, since: int | None) -> None:
        history, version = self.holdings.history, self.state.version
        held = since if since is not None and history.reaches(since, version) else None
        bitwise = client in self.transport.stateless
        delivery = deliver(history, self.state, held, bitwise=bitwise).to(client)
        self._downloads[client] = self._downloads.get(client, 0) + delivery.size
        try:
            self.transport.ask_scores(version + 1, client, delivery)
        except (RunError, OSError) as error:
            self._leave_out(client, [str(error) or type(error).__name__], 0)

    def _hear(self, reply: Reply) -> None:
        client, size = reply.client, len(reply.message or b"")
        self._downloads[client] += reply.resent
        if reply.missed and client not in self._lost:
            self._lost.add(client)
            self._send(client, None)
            return
        if client in self._clients or client in self._left_out:
            return
        if reply.message is None:
            self._leave_out(client, [reply.failure or reply.missed], 0)
            return
        expected = {"client": client, "version": self.state.id, "base": self.base}
        try:
            scores = decode_report(reply.message, self.state.version, self.metrics, expected)
        except UpdateError as error:
            self._leave_out(client, error.faults, size)
            return
        self._clients[client] = FinishedClient(
            client=client,
            since=self.holdings.versions.get(client),
            downloaded_bytes=self._downloads[client],
            uploaded_bytes=size,
            scores=scores,
        )

    def _leave_out(self, client: str, why: Collection[str], size: int) -> None:
        self._left_out[client] = LeftOutRecord(
            client=client,
            reasons=tuple(why),
            since=self.holdings.versions.get(client),
            downloaded_bytes=self._downloads[client],
            uploaded_bytes=size,
        )
