"""One round, in the eight steps of the spine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from fedexlora.engine.aggregation import RoundSums
from fedexlora.engine.certificate import Certificate, certify, enforce
from fedexlora.engine.observer import Observer
from fedexlora.engine.seeds import derive_seed
from fedexlora.engine.transport import Reply, Transport
from fedexlora.errors import NoUpdatesError, UpdateError
from fedexlora.exchange.records import BytesRecord, ClientRecord, LeftOutRecord, RoundRecord
from fedexlora.exchange.shipment import encode_own, encode_step
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
    evaluate: Callable[[], Mapping[str, float]]
    """Scores of the server's copy."""
    keep: Callable[[ClientUpdate, GlobalState], None]
    """Told of every update that is part of an aggregate, and the version it was trained from."""
    observer: Observer


@dataclass(slots=True)
class _Collected:
    """What came back in one round."""

    sums: RoundSums
    accepted: list[ClientRecord]
    left_out: list[LeftOutRecord]


def run_round(
    federation: Federation, before: GlobalState, already_sent: int = 0
) -> tuple[GlobalState, RoundRecord]:
    """Take the global model from one version to the next.

    Args:
        federation: the parts that every round has in common.
        before: the version that all clients hold; not written.
        already_sent: bytes that clients downloaded before this round to take part in it.

    Returns:
        The next version, which all clients then hold, and the round's record.

    Raises:
        NoUpdatesError: if no client delivered a usable update.
        ExactnessError: if the method is exact and the model does not apply the ideal update.
    """
    round_ = before.version + 1
    clock = _Clock()
    with clock.phase("train"):
        got = _collect(federation, before, round_)  # steps 1 to 3: arrive, check, sum
    federation.observer.phase(round_, "aggregate")
    with clock.phase("aggregate"):
        seed = derive_seed(federation.seed, round_, "")
        fresh = partial(federation.model.fresh, seed=seed)
        step = got.sums.aggregate(federation.method, fresh)  # step 4: next adapter and remainder
    with clock.phase("ship"):  # steps 5 and 6: ship, apply
        sent = federation.transport.ship(encode_step(step), encode_own(step.state))
    with clock.phase("certify"):
        certificate = certify(federation.model, got.sums, step, federation.specs)
        if federation.method.certified and not federation.model.lossy_fold:
            enforce(certificate, round_)
    federation.observer.phase(round_, "evaluate")
    with clock.phase("evaluate"):
        metrics = federation.evaluate()  # step 7
    down = sum(sent.values()) + already_sent
    record = _record(federation, round_, got, certificate, metrics, down, clock.seconds)
    return step.state, record  # step 8, the checkpoint, is the run's


def _collect(federation: Federation, before: GlobalState, round_: int) -> _Collected:
    """Receive, check and sum the updates as they arrive; unusable ones are left out by name."""
    sums = RoundSums(before, federation.model.spec, federation.specs)
    got = _Collected(sums, [], [])
    observer = federation.observer

    def progress(client: str, step: int, steps: int) -> None:
        observer.training(round_, client, step, steps)

    for reply in federation.transport.train(round_, progress):
        size = len(reply.message or b"")
        try:
            update = _checked(federation, reply, before, round_, got)
        except UpdateError as error:
            got.left_out.append(
                LeftOutRecord(client=reply.client, reasons=error.faults, uploaded_bytes=size)
            )
            continue
        got.sums.add(update, remember=federation.method.own_adapters)
        federation.keep(update, before)
        got.accepted.append(
            ClientRecord(
                client=update.client,
                num_examples=update.num_examples,
                weight=0.0,
                loss=update.loss,
                uploaded_bytes=size,
                seconds=reply.seconds,
            )
        )
    if not got.accepted:
        raise NoUpdatesError(
            f"round {round_}: no client delivered a usable update",
            [f"{c.client}: {'; '.join(c.reasons)}" for c in got.left_out],
        )
    return got


def _checked(
    federation: Federation, reply: Reply, before: GlobalState, round_: int, got: _Collected
) -> ClientUpdate:
    if reply.client in {record.client for record in got.accepted}:
        raise UpdateError(round_, reply.client, ["sent twice; the first update counts"])
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
    down: int,
    seconds: Mapping[str, float],
) -> RoundRecord:
    clients = tuple(
        record.model_copy(update={"weight": record.num_examples / got.sums.weight})
        for record in got.accepted
    )
    up = sum(c.uploaded_bytes for c in clients) + sum(c.uploaded_bytes for c in got.left_out)
    return RoundRecord(
        round=round_,
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
