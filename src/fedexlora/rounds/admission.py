"""The first steps of a round: who takes part is asked, and what comes back is admitted or refused.

An update is bounded before it is decoded, held against the spec, brought to the common form and
spooled; then it counts, also if the server is killed in the next moment. What is refused is named
in the round's record, with every fault, and the round goes on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from fedexlora.errors import NoUpdatesError, RunError, UpdateError
from fedexlora.exchange.delivery import Delivery, deliver
from fedexlora.exchange.history import Holdings
from fedexlora.exchange.records import ClientRecord, LeftOutRecord
from fedexlora.exchange.seeds import derive_seed
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate, check_update, decode_update
from fedexlora.methods.rule import MemoryRule
from fedexlora.rounds.common_update import CommonForm
from fedexlora.rounds.participation import AccessList, Participation
from fedexlora.rounds.spool import Spool, SpooledUpdate
from fedexlora.rounds.transport import ClientProgress, Reply, Transport


@dataclass(slots=True)
class Intake:
    """What came back in one round."""

    updates: list[SpooledUpdate] = field(default_factory=list)
    """Those that count, in the order in which they are added up: that of the draw, and late ones of
    other clients after them; by weight, where a rule against bad updates has changed any."""
    stay: float = 0.0
    """What the version that the round started from counts beside them."""
    draw: tuple[str, ...] = ()
    """Who takes part."""
    left_out: list[LeftOutRecord] = field(default_factory=list)
    """Those that do not, in the order of the draw."""
    downloads: dict[str, int] = field(default_factory=dict)
    """Bytes by client that was asked."""
    landed: list[str] = field(default_factory=list)
    """Clients that came to the version that the round started from."""
    lost: list[str] = field(default_factory=list)
    """Clients that hold nothing."""

    @property
    def weight(self) -> float:
        """Of all that count."""
        return sum(update.weight for update in self.updates) + self.stay

    def in_draw(self) -> Callable[[str], tuple[int, str]]:
        """A key that sorts clients as they were drawn, and others after them by name."""
        places = {client: i for i, client in enumerate(self.draw)}
        return lambda client: (places.get(client, len(places)), client)

    def leave_out(self, client: str, reasons: Sequence[str], since: int | None, size: int) -> None:
        """Say why a client's update does not count.

        Args:
            client: the client.
            reasons: every fault.
            since: the version that it held before the round.
            size: bytes of what it sent.
        """
        self.left_out.append(
            LeftOutRecord(
                client=client,
                reasons=tuple(reasons),
                since=since,
                downloaded_bytes=self.downloads.get(client, 0),
                uploaded_bytes=size,
            )
        )

    def reasons(self) -> list[str]:
        """Why clients are left out, one line each."""
        return [f"{out.client}: {'; '.join(out.reasons)}" for out in self.left_out]


class Admission:
    """Asks the clients of one round and takes in what they send.

    Args:
        transport: how clients are reached.
        rule: who takes part, and how much each one counts.
        form: of the round's updates; its version is the one that the round starts from.
        holdings: what clients hold.
        base: fingerprint of the base model.
        spool: where updates are put.
        access: whom the recipe admits; by default everybody.
        memory: whether clients remember something of the method, and whether one that has lost it
            is left out.
        metrics: by version, what clients that train from it score it by; nothing by default.
        holders: whether clients send their half of the certificate.
        exact_holders: whether one whose live model is not the version's is left out.
    """

    def __init__(
        self,
        transport: Transport,
        rule: Participation,
        form: CommonForm,
        holdings: Holdings,
        base: str,
        spool: Spool,
        access: AccessList | None = None,
        memory: MemoryRule = "none",
        metrics: Callable[[int], Collection[str]] | None = None,
        *,
        holders: bool = False,
        exact_holders: bool = False,
    ) -> None:
        self._transport = transport
        self._rule = rule
        self._form = form
        self._before = form.before
        self._round = form.before.version + 1
        self._holdings = holdings
        self._base = base
        self._spool = spool
        self._access = access or AccessList()
        self._memory = memory
        self._metrics = metrics or _no_metrics
        self._holders = holders
        self._exact_holders = exact_holders
        self._delivered: set[str] = set()
        self._waiting = dict(transport.waiting)
        self._deliveries: dict[tuple[int | None, bool], Delivery] = {}
        self._asked: set[str] = set()
        self.intake = Intake()

    def draw(self, seed: int) -> list[str]:
        """Draw who takes part, or go on with a draw and updates that an interrupted round has left.

        Args:
            seed: the federation's.

        Returns:
            Files of the interrupted round that are passed over, and why.

        Raises:
            OSError: if the draw cannot be made durable.
        """
        found = self._spool.find()
        if found.draw is None:
            clients = self._transport.clients
            self.intake.draw = tuple(self._rule.sample(clients, seed, self._round))
            self._spool.begin(self.intake.draw)
            return list(found.faults)
        for client, update in found.updates.items():
            if self._access.fault(client):
                self._spool.discard(client)
            else:
                self._take_up(update)
        self.intake.draw = self._filled_up(found.draw, seed)
        if self.intake.draw != found.draw:
            self._spool.draw(self.intake.draw)
        return list(found.faults)

    def _filled_up(self, draw: tuple[str, ...], seed: int) -> tuple[str, ...]:
        """An earlier draw, in which others take the place of clients that cannot deliver any more.

        Those that are shut out always go; those that are not connected only where the round has too
        few updates without others.
        """
        clients = self._transport.clients
        admitted = [client for client in draw if not self._access.fault(client)]
        present = [c for c in admitted if c in self._delivered or c in clients]
        kept = admitted if len(present) >= self._rule.min_updates else present
        if len(kept) == len(draw):
            return draw
        others = [client for client in clients if client not in draw]
        generator = random.Random(derive_seed(seed, self._round, "\0replacements"))
        more = generator.sample(others, min(len(draw) - len(kept), len(others)))
        return (*kept, *sorted(more))

    def ask(self) -> None:
        """Bring clients to the version of the round, by what they lack, and have them train.

        Those that still work for an earlier round are left out. Those of whom an update is there
        already are not asked again.
        """
        for client in self.intake.draw:
            if client in self._delivered:
                continue
            if client in self._waiting:
                self._leave_out(client, [f"it still works for round {self._waiting[client]}"], 0)
            else:
                self._send(client, self._holdings.versions.get(client))

    def receive(self, progress: ClientProgress) -> Intake:
        """Check and spool what comes back, as it comes; what is unusable is left out by name.

        Args:
            progress: told of the clients' steps.

        Raises:
            OSError: if an update cannot be spooled, as on a full disk.
        """
        for reply in self._transport.replies(self._round, self._rule.deadline, progress):
            self._hear(reply)
            del reply  # its message, before the next one is pulled
        heard = self._delivered | {c.client for c in self.intake.left_out}
        for client in self.intake.downloads:
            if client not in heard:
                self._leave_out(client, ["it did not answer"], 0)
        # Whatever comes first: sums and records are those of the draw.
        place = self.intake.in_draw()
        self.intake.updates.sort(key=lambda x: place(x.client))
        self.intake.left_out.sort(key=lambda x: place(x.client))
        return self.intake

    def _take_up(self, update: SpooledUpdate) -> None:
        """An update that was there before the server was killed."""
        client, record = update.client, update.record
        self._delivered.add(client)
        self.intake.updates.append(update)
        if record.staleness == 0:
            self.intake.downloads[client] = record.downloaded_bytes
            if update.landed:
                self.intake.landed.append(client)
                self._transport.restore(client, self._before)

    def _send(self, client: str, since: int | None) -> None:
        delivery = self._delivery(since, client in self._transport.stateless).to(client)
        downloads = self.intake.downloads
        downloads[client] = downloads.get(client, 0) + delivery.size
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

    def _hear(self, reply: Reply) -> None:
        """Spool a reply's update, if it has one that counts."""
        size = len(reply.message or b"")
        fresh = reply.round == self._round and reply.client in self._asked
        if reply.client in self.intake.downloads:
            self.intake.downloads[reply.client] += reply.resent
        if fresh and reply.missed:
            self._missed(reply)
            return
        landed = fresh and reply.landed
        if landed and reply.client not in self.intake.landed:
            self.intake.landed.append(reply.client)
        try:
            update, start = self._checked(reply)
        except UpdateError as error:
            self._leave_out(reply.client, error.faults, size)
            return
        record = self._record(reply, update)
        self._delivered.add(reply.client)
        tensors = self._form.tensors(update, start)
        self.intake.updates.append(self._spool.add(tensors, record, landed=landed))

    def _missed(self, reply: Reply) -> None:
        """A client holds something else than the server knew: it takes a snapshot, once."""
        if reply.client in self.intake.lost:
            self._leave_out(reply.client, [reply.missed], 0)
            return
        self.intake.lost.append(reply.client)
        self._send(reply.client, None)

    def _checked(self, reply: Reply) -> tuple[ClientUpdate, GlobalState]:
        """A reply's update, and what it was trained from.

        Raises:
            UpdateError: naming every fault.
        """
        client, downloads = reply.client, self.intake.downloads
        if client in self._delivered:
            self._refuse(client, "sent twice; the first update counts")
        if reply.round >= self._round and client not in downloads:
            self._refuse(client, "it was not asked to take part in this round")
        if reply.round >= self._round and client not in self._asked:
            self._refuse(client, "it was not brought to the round's version")
        if reply.message is None:
            self._refuse(client, reply.failure or reply.missed)
        start = self._before if reply.round >= self._round else self._stale_start(reply)
        spec = self._form.spec_of(client)
        metrics, message = self._metrics(start.version), reply.message or b""
        update = decode_update(
            message,
            spec,
            self._round,
            client,
            metrics,
            holder=self._holders,
            remembers=self._memory != "none",
        )
        check_update(
            update,
            spec,
            client=client,
            round_=min(reply.round, self._round),
            version=start.id,
            base=self._base,
            rows=reply.rows,
        )
        self._check_memory(update)
        self._check_holder(update)
        return update, start

    def _check_holder(self, update: ClientUpdate) -> None:
        """Refuse what was trained in a model that is not the version's.

        Raises:
            UpdateError: if the client says so itself.
        """
        found = update.holder
        if self._exact_holders and found is not None and found.bound > found.allowed:
            said = f"error {found.bound:.1e} of the update, allowed {found.allowed:.1e}"
            self._refuse(update.client, f"its live model is not the version's: {said}")

    def _check_memory(self, update: ClientUpdate) -> None:
        """Refuse an update that began with a memory that cannot be right.

        Raises:
            UpdateError: if it is of this round or a later one, or gone where it is needed.
        """
        if update.memory is None:
            return
        if not 0 <= update.memory < update.round:
            said = f"memory: expected that of a round before {update.round}, found {update.memory}"
            self._refuse(update.client, said)
        known = update.client in self._holdings.versions
        if self._memory == "required" and known and update.memory == 0:
            self._refuse(update.client, "its memory of the rounds before is gone")

    def _record(self, reply: Reply, update: ClientUpdate) -> ClientRecord:
        staleness = self._round - reply.round
        return ClientRecord(
            client=reply.client,
            num_examples=update.num_examples,
            weight=self._rule.weight(update.num_examples, staleness),
            loss=update.loss,
            counted=1.0,
            norm=None,
            staleness=staleness,
            since=self._holdings.versions.get(reply.client),
            downloaded_bytes=self.intake.downloads.get(reply.client, 0),
            uploaded_bytes=len(reply.message or b""),
            seconds=reply.seconds,
            memory=update.memory,
            scores=update.scores,
            holder=update.holder,
        )

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

    def _leave_out(self, client: str, why: Sequence[str], uploaded: int) -> None:
        self.intake.leave_out(client, why, self._holdings.versions.get(client), uploaded)


def _no_metrics(version: int) -> tuple[str, ...]:
    """Clients score nothing."""
    del version
    return ()


def require_enough(intake: Intake, rule: Participation, round_: int) -> None:
    """See to it that a mean can be taken.

    Raises:
        NoUpdatesError: if fewer clients than are needed delivered a usable update.
    """
    found, enough = len(intake.updates), rule.min_updates
    if found >= enough:
        return
    if not intake.left_out and not found:
        raise NoUpdatesError(f"round {round_}: no client is connected")
    raise NoUpdatesError(
        f"round {round_}: {found} usable updates, federation.min_updates is {enough}"
        if found
        else f"round {round_}: no client delivered a usable update",
        intake.reasons(),
    )
