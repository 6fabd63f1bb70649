"""The first steps of a round: clients are asked; what they send is checked and summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from fedexlora.errors import NoUpdatesError, RunError, UpdateError
from fedexlora.exchange.delivery import Delivery, deliver
from fedexlora.exchange.history import Holdings
from fedexlora.exchange.records import ClientRecord, LeftOutRecord
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate, check_update, decode_update
from fedexlora.rounds.aggregation import RoundSums
from fedexlora.rounds.participation import Participation
from fedexlora.rounds.screening import Screening, gram_of, strains_of
from fedexlora.rounds.transport import ClientProgress, Reply, Transport

Keep = Callable[[ClientUpdate, float, GlobalState], None]
"""Told of every update that is part of an aggregate, what it counts, and what it started from."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A checked update."""

    update: ClientUpdate
    start: GlobalState
    """What it was trained from."""
    weight: float
    """What it counts; only ratios matter."""
    record: ClientRecord


@dataclass(slots=True)
class Collected:
    """What came back in one round."""

    sums: RoundSums
    accepted: list[ClientRecord] = field(default_factory=list)
    left_out: list[LeftOutRecord] = field(default_factory=list)
    downloads: dict[str, int] = field(default_factory=dict)
    """Bytes by client that was asked."""
    landed: list[str] = field(default_factory=list)
    """Clients that came to the version that the round started from."""
    lost: list[str] = field(default_factory=list)
    """Clients that hold nothing."""
    stay: float = 0.0
    """What the version that the round started from counts beside the clients."""


class Collector:
    """Asks the clients of one round and takes in what they send.

    Args:
        transport: how clients are reached.
        rule: who takes part, and how much each one counts.
        before: the version that the round starts from.
        holdings: what clients hold.
        spec: the common adapter.
        specs: the adapters of the clients that have another one, by client.
        base: fingerprint of the base model.
        screening: the rule against bad updates; without one, no update is kept once it is summed.
    """

    def __init__(
        self,
        transport: Transport,
        rule: Participation,
        before: GlobalState,
        holdings: Holdings,
        spec: AdapterSpec,
        specs: Mapping[str, AdapterSpec],
        base: str,
        screening: Screening | None = None,
    ) -> None:
        self._transport = transport
        self._rule = rule
        self._before = before
        self._round = before.version + 1
        self._holdings = holdings
        self._spec = spec
        self._specs = specs
        self._base = base
        self._screening = screening
        self._gathered: list[Arrived] = []
        self._delivered: set[str] = set()
        self._waiting = dict(transport.waiting)
        self._deliveries: dict[tuple[int | None, bool], Delivery] = {}
        self._asked: set[str] = set()
        self.got = Collected(RoundSums(before, spec, specs))

    def ask(self, clients: Sequence[str]) -> None:
        """Bring clients to the version of the round, by what they lack, and have them train.

        Those that still work for an earlier round are left out.
        """
        for client in clients:
            if client in self._waiting:
                self._leave_out(client, [f"it still works for round {self._waiting[client]}"], 0)
            else:
                self._send(client, self._holdings.versions.get(client))

    def receive(self, keep: Keep, progress: ClientProgress, *, remember: bool) -> None:
        """Check and sum what comes back, as it comes; what is unusable is left out by name.

        With a rule against bad updates they are checked only: it has to see all of them first.

        Args:
            keep: told of every update that counts.
            progress: told of the clients' steps.
            remember: keep factors, for a method whose clients continue from their own.
        """
        for reply in self._transport.replies(self._round, self._rule.deadline, progress):
            arrived = self._arrived(reply)
            if arrived is None:
                continue
            self._delivered.add(arrived.update.client)
            if self._screening is None:
                self._count(arrived, keep, remember=remember)
            else:
                self._gathered.append(arrived)
        heard = self._delivered | {c.client for c in self.got.left_out}
        for client in self.got.downloads:
            if client not in heard:
                self._leave_out(client, ["it did not answer"], 0)

    def screen(self, keep: Keep, *, remember: bool) -> None:
        """Sum what the rule against bad updates lets pass; what it rejects is left out by name.

        Args:
            keep: told of every update that counts, with what it counts by the rule.
            remember: keep factors, for a method whose clients continue from their own.

        Raises:
            NoUpdatesError: if there are too few updates for the rule to protect anything.
        """
        given, self._gathered = self._gathered, []
        if self._screening is None or not given:
            return
        if short := self._screening.shortfall(len(given)):
            raise NoUpdatesError(f"round {self._round}: {short}", self._reasons())
        pairs = [(a.update, a.start) for a in given]
        gram = gram_of(pairs, self._before, self._spec, self._specs)
        judged = self._screening.judge(gram, [a.weight for a in given])
        strains = strains_of(pairs, judged, self._before, self._spec, self._specs)
        judged = self._screening.relieved(judged, strains)
        counted = []
        for i, arrived in enumerate(given):
            if judged.reasons[i]:
                size = arrived.record.uploaded_bytes
                self._leave_out(arrived.record.client, [judged.reasons[i]], size)
                continue
            weight, kept = judged.result.weights[i], judged.result.kept[i]
            said = {"weight": weight, "counted": kept, "norm": judged.norms[i]}
            record = arrived.record.model_copy(update=said)
            counted.append(replace(arrived, weight=weight, record=record))
        self.got.stay = judged.result.stay
        if counted and self.got.stay > 0.0:
            self.got.sums.stay(self.got.stay)
        before = {a.record.client: a.weight for a in given}
        if any(a.weight != before[a.record.client] for a in counted):
            # An update that counts little may be of any size: the running means of the moments
            # must not begin with it.
            counted.sort(key=lambda a: -a.weight)
        for arrived in counted:
            self._count(arrived, keep, remember=remember)
        places = list(before)
        self.got.accepted.sort(key=lambda record: places.index(record.client))

    def require_enough(self) -> None:
        """See to it that a mean can be taken.

        Raises:
            NoUpdatesError: if fewer clients than are needed delivered a usable update.
        """
        found, enough = len(self.got.accepted), self._rule.min_updates
        if found >= enough:
            return
        if not self.got.left_out and not found:
            raise NoUpdatesError(f"round {self._round}: no client is connected")
        raise NoUpdatesError(
            f"round {self._round}: {found} usable updates, federation.min_updates is {enough}"
            if found
            else f"round {self._round}: no client delivered a usable update",
            self._reasons(),
        )

    def _count(self, arrived: Arrived, keep: Keep, *, remember: bool) -> None:
        self.got.sums.add(arrived.update, arrived.weight, arrived.start, remember=remember)
        keep(arrived.update, arrived.weight, arrived.start)
        self.got.accepted.append(arrived.record)

    def _send(self, client: str, since: int | None) -> None:
        delivery = self._delivery(since, client in self._transport.stateless).to(client)
        self.got.downloads[client] = self.got.downloads.get(client, 0) + delivery.size
        try:
            self._transport.ask(self._round, client, delivery)
        except (RunError, OSError) as error:
            self._leave_out(client, [str(error) or type(error).__name__], 0)
        else:
            self._asked.add(client)

    def _delivery(self, since: int | None, stateless: bool) -> Delivery:
        """What brings clients from a version to that of the round, made once for all of them."""
        history, before = self._holdings.history, self._before
        held = since if since is not None and history.reaches(since, before.version) else None
        key = held, stateless
        if key not in self._deliveries:
            self._deliveries[key] = deliver(history, before, held, bitwise=stateless)
        return self._deliveries[key]

    def _arrived(self, reply: Reply) -> Arrived | None:
        """A reply's update; None if it has none that counts."""
        size = len(reply.message or b"")
        fresh = reply.round == self._round and reply.client in self._asked
        if reply.client in self.got.downloads:
            self.got.downloads[reply.client] += reply.resent
        if fresh and reply.missed:
            self._missed(reply)
            return None
        if fresh and reply.landed and reply.client not in self.got.landed:
            self.got.landed.append(reply.client)
        try:
            return self._checked(reply, size)
        except UpdateError as error:
            self._leave_out(reply.client, error.faults, size)
            return None

    def _missed(self, reply: Reply) -> None:
        """A client holds something else than the server knew: it takes a snapshot, once."""
        if reply.client in self.got.lost:
            self._leave_out(reply.client, [reply.missed], 0)
            return
        self.got.lost.append(reply.client)
        self._send(reply.client, None)

    def _checked(self, reply: Reply, size: int) -> Arrived:
        client, got = reply.client, self.got
        if client in self._delivered:
            self._refuse(client, "sent twice; the first update counts")
        if reply.round >= self._round and client not in got.downloads:
            self._refuse(client, "it was not asked to take part in this round")
        if reply.round >= self._round and client not in self._asked:
            self._refuse(client, "it was not brought to the round's version")
        if reply.message is None:
            self._refuse(client, reply.failure)
        start = self._before if reply.round >= self._round else self._stale_start(reply)
        spec = self._specs.get(client, self._spec)
        update = decode_update(reply.message or b"", spec, self._round, client)
        check_update(
            update,
            spec,
            client=client,
            round_=min(reply.round, self._round),
            version=start.id,
            base=self._base,
            rows=reply.rows,
        )
        staleness = self._round - reply.round
        weight = self._rule.weight(update.num_examples, staleness)
        record = ClientRecord(
            client=client,
            num_examples=update.num_examples,
            weight=weight,
            loss=update.loss,
            counted=1.0,
            norm=None,
            staleness=staleness,
            since=self._holdings.versions.get(client),
            downloaded_bytes=got.downloads.get(client, 0),
            uploaded_bytes=size,
            seconds=reply.seconds,
        )
        return Arrived(update, start, weight, record)

    def _stale_start(self, reply: Reply) -> GlobalState:
        """What an update of an earlier round was trained from, if it may count."""
        client, version = reply.client, reply.round - 1
        said = f"late: an update of round {reply.round} in round {self._round}"
        if self._rule.stale == "refuse":
            self._refuse(client, said)
        if self._waiting.get(client) != reply.round:
            self._refuse(client, f"{said}, which was not waited for")
        start = self._holdings.history.start(version)
        if start is None:
            window = self._holdings.history.window
            self._refuse(client, f"{said}; at most {window} rounds (federation.history)")
        return start

    def _refuse(self, client: str, reason: str) -> NoReturn:
        raise UpdateError(self._round, client, [reason])

    def _leave_out(self, client: str, reasons: Sequence[str], uploaded: int) -> None:
        self.got.left_out.append(
            LeftOutRecord(
                client=client,
                reasons=tuple(reasons),
                since=self._holdings.versions.get(client),
                downloaded_bytes=self.got.downloads.get(client, 0),
                uploaded_bytes=uploaded,
            )
        )

    def _reasons(self) -> list[str]:
        return [f"{c.client}: {'; '.join(c.reasons)}" for c in self.got.left_out]
