"""One round, in the eight steps of the spine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

from fedexlora.exchange.history import Holdings
from fedexlora.exchange.records import BytesRecord, RoundRecord
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.step_writer import StepSink
from fedexlora.local.seeds import derive_seed
from fedexlora.methods import Method
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.certificate import Certificate, Forward, certify, enforce
from fedexlora.rounds.collect import Collected, Collector, Keep
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.participation import Participation
from fedexlora.rounds.screening import Screening
from fedexlora.rounds.transport import Transport


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
    keep: Keep
    """Told of every update that counts."""
    observer: Observer
    screening: Screening | None = None
    """The rule against bad updates, if there is one."""
    forwards: Mapping[Arithmetic, Forward] = field(default_factory=dict)
    """By arithmetic in which the model is used: runs the server's copy so on some real inputs."""
    scored: Callable[[int], bool] | None = None
    """Which rounds end with scores; all if not given."""


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
    collector = Collector(
        federation.transport,
        federation.participation,
        before,
        holdings,
        federation.model.spec,
        federation.specs,
        federation.model.base_fingerprint,
        federation.screening,
    )
    with clock.phase("ship"):
        clients = federation.transport.clients
        collector.ask(federation.participation.sample(clients, federation.seed, round_))
    with clock.phase("train"):  # steps 1 to 3
        collector.receive(
            federation.keep,
            partial(federation.observer.training, round_),
            remember=federation.method.own_adapters,
        )
    if federation.screening is not None:
        federation.observer.phase(round_, "screen")
        with clock.phase("screen"):
            collector.screen(federation.keep, remember=federation.method.own_adapters)
    collector.require_enough()
    got = collector.got
    federation.observer.phase(round_, "aggregate")
    with clock.phase("aggregate"):
        seed = derive_seed(federation.seed, round_, "")
        fresh = partial(federation.model.fresh, seed=seed)
        held = holdings.changes(before.version, got.landed, got.lost)
        with closing(_sink(federation, before, holdings, got, held)) as sink:
            # step 4: next adapter and remainder
            aggregate = got.sums.aggregate(federation.method, fresh, sink, held)
    with clock.phase("apply"):
        federation.model.apply(aggregate.state)
    with clock.phase("certify"):
        certificate = certify(
            federation.model, got.sums, aggregate, federation.specs, federation.forwards
        )
        if federation.method.certified and not federation.model.lossy_fold:
            enforce(certificate, got.sums, round_)
    metrics: Mapping[str, float] = {}
    with clock.phase("evaluate"):
        if federation.scored is None or federation.scored(round_):
            federation.observer.phase(round_, "evaluate")
            metrics = federation.evaluate()  # step 7
    after = holdings.after(aggregate.step, held)
    record = _record(federation, round_, got, certificate, metrics, clock.seconds)
    return aggregate.state, after, record  # step 8, storing it, is the run's


def _sink(
    federation: Federation,
    before: GlobalState,
    holdings: Holdings,
    got: Collected,
    held: Mapping[str, int | None],
) -> StepSink:
    """What takes in the round's step."""
    owners = set(before.own) | set(federation.specs)
    if federation.method.own_adapters:
        owners.update(record.client for record in got.accepted)
    return holdings.history.store.sink(before, federation.method.trained, owners, held)


def _record(
    federation: Federation,
    round_: int,
    got: Collected,
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
    down = sum(got.downloads.values())
    return RoundRecord(
        round=round_,
        registered=len(federation.transport.clients),
        method=federation.method.name,
        clients=clients,
        left_out=tuple(got.left_out),
        stay=got.stay / got.sums.weight,
        bytes=BytesRecord(up=up, down=down),
        deviation=certificate.deviation,
        certificate=certificate.overall,
        modules=certificate.modules,
        # In the order in which the store gives them back: records are the same to the byte.
        metrics=dict(sorted(metrics.items())),
        seconds=dict(sorted(seconds.items())),
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
