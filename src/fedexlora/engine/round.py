"""One round, in the eight steps of the spine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from fedexlora.engine.aggregation import RoundSums
from fedexlora.engine.certificate import Certificate, certify, enforce
from fedexlora.engine.observer import Observer
from fedexlora.engine.participation import Participation
from fedexlora.engine.seeds import derive_seed
from fedexlora.engine.transport import Reply, Transport
from fedexlora.errors import NoUpdatesError, RunError, UpdateError
from fedexlora.exchange.records import BytesRecord, ClientRecord, LeftOutRecord, RoundRecord
from fedexlora.exchange.shipment import Holdings, encode_own
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate, check_update, decode_update
from fedexlora.methods import Method
from fedexlora.peft_bridge.model import AdaptedModel


@dataclass(frozen=True, slots=True)
class Federation:
    """What every round of a run has in common."""

    method: Method
    model: AdaptedModel
    """The server's copy of the global model."""
    specs: Mapping[str, AdapterSpec]
    """The adapters of the clients that have another one than the model, by client."""
    seed: int
    """The federation's."""
    transport: Transport
    participation: Participation
    evaluate: Callable[[], Mapping[str, float]]
    """Scores of the server's copy."""
    keep: Callable[[ClientUpdate, float, GlobalState], None]
    """Told of every update that is part of an aggregate, what it counts, and the version that it
    was trained from."""
    observer: Observer


@dataclass(frozen=True, slots=True)
class _Delivery:
    """How one client came to the version of the round."""

    since: int | None
    """The version that it held before."""
    size: int
    """Bytes of the messages."""
    fault: str
    """Why it did not; empty if it did."""


@dataclass(slots=True)
class _Collected:
    """What came back in one round."""

    sums: RoundSums
    deliveries: Mapping[str, _Delivery]
    accepted: list[ClientRecord]
    left_out: list[LeftOutRecord]


def run_round(
    federation: Federation, before: GlobalState, holdings: Holdings
) -> tuple[GlobalState, Holdings, RoundRecord]:
    """Take the global model from one version to the next.

    Args:
        federation: the parts that every round has in common.
        before: the version that the round starts from; not written.
        holdings: what clients hold.

    Returns:
        The next version, what clients hold then, and the round's record.

    Raises:
        NoUpdatesError: if fewer clients than are needed delivered a usable update.
        ExactnessError: if the method is exact and the model does not apply the ideal update.
    """
    round_ = before.version + 1
    clock = _Clock()
    asked = federation.participation.sample(federation.transport.clients, federation.seed, round_)
    with clock.phase("ship"):
        deliveries = _deliver(federation, before, holdings, asked)
    with clock.phase("train"):
        got = _collect(federation, before, round_, deliveries)  # steps 1 to 3
    federation.observer.phase(round_, "aggregate")
    with clock.phase("aggregate"):
        seed = derive_seed(federation.seed, round_, "")
        fresh = partial(federation.model.fresh, seed=seed)
        step = got.sums.aggregate(federation.method, fresh)  # step 4: next adapter and remainder
    with clock.phase("apply"):
        federation.model.apply(step.state)
    with clock.phase("certify"):
        certificate = certify(federation.model, got.sums, step, federation.specs)
        if federation.method.certified and not federation.model.lossy_fold:
            enforce(certificate, round_)
    federation.observer.phase(round_, "evaluate")
    with clock.phase("evaluate"):
        metrics = federation.evaluate()  # step 7
    landed = [client for client, delivery in deliveries.items() if not delivery.fault]
    lost = [client for client, delivery in deliveries.items() if delivery.fault]
    after = holdings.after(step, landed, lost)
    record = _record(federation, round_, got, certificate, metrics, clock.seconds)
    return step.state, after, record  # step 8, the checkpoint, is the run's


def _deliver(
    federation: Federation, before: GlobalState, holdings: Holdings, asked: Sequence[str]
) -> dict[str, _Delivery]:
    """Bring every client of the round to its version, by the smallest message that does."""
    messages: dict[int | None, bytes] = {}

    def message(held: int | None) -> bytes:
        if held not in messages:
            messages[held] = holdings.history.encode(before, held)
        return messages[held]

    deliveries = {}
    for client in asked:
        since, own = holdings.versions.get(client), encode_own(before, client)
        size, fault = 0, ""
        reachable = holdings.history.reaches(since, before.version)
        for held in (since, None) if reachable else (None,):
            size += len(message(held)) + len(own or b"")
            try:
                federation.transport.deliver(client, message(held), own)
            except RunError as error:
                fault = str(error)
            else:
                fault = ""
                break
        deliveries[client] = _Delivery(since, size, fault)
    return deliveries


def _collect(
    federation: Federation,
    before: GlobalState,
    round_: int,
    deliveries: Mapping[str, _Delivery],
) -> _Collected:
    """Receive, check and sum the updates as they arrive; unusable ones are left out by name."""
    sums = RoundSums(before, federation.model.spec, federation.specs)
    got = _Collected(sums, deliveries, [], [])
    observer, participation = federation.observer, federation.participation

    def progress(client: str, step: int, steps: int) -> None:
        observer.training(round_, client, step, steps)

    for client, delivery in deliveries.items():
        if delivery.fault:
            got.left_out.append(_left_out(client, [delivery.fault], delivery, 0))
    ready = [client for client, delivery in deliveries.items() if not delivery.fault]
    for reply in federation.transport.train(round_, ready, progress):
        size = len(reply.message or b"")
        delivery = deliveries.get(reply.client, _Delivery(None, 0, ""))
        try:
            update = _checked(federation, reply, before, round_, got)
        except UpdateError as error:
            got.left_out.append(_left_out(reply.client, error.faults, delivery, size))
            continue
        weight = participation.weight(update.num_examples)
        got.sums.add(update, weight, remember=federation.method.own_adapters)
        federation.keep(update, weight, before)
        got.accepted.append(
            ClientRecord(
                client=update.client,
                num_examples=update.num_examples,
                weight=weight,
                loss=update.loss,
                since=delivery.since,
                downloaded_bytes=delivery.size,
                uploaded_bytes=size,
                seconds=reply.seconds,
            )
        )
    if len(got.accepted) < participation.min_updates:
        enough = participation.min_updates
        raise NoUpdatesError(
            f"round {round_}: no client delivered a usable update"
            if not got.accepted
            else f"round {round_}: {len(got.accepted)} usable updates, "
            f"federation.min_updates is {enough}",
            [f"{c.client}: {'; '.join(c.reasons)}" for c in got.left_out],
        )
    return got


def _left_out(
    client: str, reasons: Sequence[str], delivery: _Delivery, uploaded: int
) -> LeftOutRecord:
    return LeftOutRecord(
        client=client,
        reasons=tuple(reasons),
        since=delivery.since,
        downloaded_bytes=delivery.size,
        uploaded_bytes=uploaded,
    )


def _checked(
    federation: Federation, reply: Reply, before: GlobalState, round_: int, got: _Collected
) -> ClientUpdate:
    if reply.client in {record.client for record in got.accepted}:
        raise UpdateError(round_, reply.client, ["sent twice; the first update counts"])
    if reply.client not in got.deliveries:
        raise UpdateError(round_, reply.client, ["it was not asked to take part in this round"])
    if late := federation.participation.late(reply.seconds):
        raise UpdateError(round_, reply.client, [late])
    if reply.message is None:
        raise UpdateError(round_, reply.client, [reply.failure])
    update = decode_update(reply.message, round_, reply.client)
    check_update(
        update,
        federation.specs.get(reply.client, federation.model.spec),
        client=reply.client,
        round_=round_,
        version=before.version,
        base=federation.model.base_fingerprint,
    )
    return update


def _record(
    federation: Federation,
    round_: int,
    got: _Collected,
    certificate: Certificate,
    metrics: Mapping[str, float],
    seconds: Mapping[str, float],
) -> RoundRecord:
    clients = tuple(
        record.model_copy(update={"weight": record.weight / got.sums.weight})
        for record in got.accepted
    )
    up = sum(c.uploaded_bytes for c in clients) + sum(c.uploaded_bytes for c in got.left_out)
    # Not of the left out alone: a client that sends twice is listed twice, and downloads once.
    down = sum(delivery.size for delivery in got.deliveries.values())
    return RoundRecord(
        round=round_,
        registered=len(federation.transport.clients),
        method=federation.method.name,
        clients=clients,
        left_out=tuple(got.left_out),
        bytes=BytesRecord(up=up, down=down),
        deviation=certificate.deviation,
        certificate=certificate.overall,
        modules=certificate.modules,
        metrics=dict(metrics),
        seconds=dict(seconds),
    )


class _Clock:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
