"""One round, in the eight steps of the spine."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedexlora.errors import RunError
from fedexlora.exchange.files import writing
from fedexlora.exchange.history import Holdings
from fedexlora.exchange.holders import worst_of
from fedexlora.exchange.layout import each_once
from fedexlora.exchange.records import BytesRecord, RoundRecord
from fedexlora.exchange.scores import taken_together
from fedexlora.exchange.seeds import derive_seed
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.step_writer import StepSink
from fedexlora.exchange.version import Adapter
from fedexlora.methods import Rule
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.origin import Origin
from fedexlora.rounds.admission import Admission, Intake, require_enough
from fedexlora.rounds.common_update import CommonForm
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.participation import AccessList, Participation
from fedexlora.rounds.reduction import Reducer, Reduction, WeightedUpdate
from fedexlora.rounds.screening import Screening, screen, strained
from fedexlora.rounds.spool import Spool, SpooledUpdate
from fedexlora.rounds.step_certificate import Certificate, certify_step, enforce
from fedexlora.rounds.transport import Transport

if TYPE_CHECKING:  # it needs PEFT
    from fedexlora.peft_bridge.model import AdaptedModel


@dataclass(frozen=True, slots=True)
class Federation:
    """What every round of a run has in common."""

    method: str
    """Its name."""
    rule: Rule
    """What clients and server do by it."""
    model: AdaptedModel | None
    """The server's copy of the global model, if it has one."""
    specs: Mapping[str, AdapterSpec]
    """The adapters of the clients that have another one than the model, by client."""
    seed: int
    """The federation's."""
    transport: Transport
    participation: Participation
    evaluate: Callable[[GlobalState], Mapping[str, float]]
    """Scores of a version that the server's copy is at."""
    spool: Path
    """The folder of the updates of the round that is open."""
    keep: Callable[[Sequence[SpooledUpdate]], None]
    """Told of the updates that count."""
    observer: Observer
    access: AccessList = field(default_factory=AccessList)
    """Whom the recipe admits."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where updates are reduced."""
    screening: Screening | None = None
    """The rule against bad updates, if there is one."""
    forwards: Mapping[Arithmetic, Callable[[], None]] = field(default_factory=dict)
    """By arithmetic in which the model is used: runs the server's copy so on some real inputs."""
    scored: Callable[[int], bool] | None = None
    """Which rounds end with scores; all if not given."""
    metrics: Callable[[int], Collection[str]] | None = None
    """By version, what clients that train from it score it by; nothing if not given."""
    origin: Origin | None = None
    """Where the run begins, if the server has no model."""
    exact_holders: bool = False
    """Whether a client is left out whose live model is not the version's, as it says itself."""
    resident: AdaptedModel | None = None
    """That of clients in this process, which draws factors where the server has no model."""

    @property
    def spec(self) -> AdapterSpec:
        """What clients train that have no adapter of their own."""
        return self._begun.spec if self.model is None else self.model.spec

    @property
    def base(self) -> str:
        """Fingerprint of the base model."""
        return self._begun.base if self.model is None else self.model.base_fingerprint

    @property
    def _begun(self) -> Origin:
        if self.origin is None:
            raise RunError("a federation needs a model, or where its run begins")
        return self.origin

    def fresh(self, spec: AdapterSpec, seed: int) -> Adapter:
        """New factors of given ranks.

        Raises:
            RunError: if the server has no model to draw them for.
        """
        model = self.model or self.resident
        if model is None:
            raise RunError("a server without a model draws no factors")
        return model.fresh(spec, seed)


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
    round_, clock = before.version + 1, _Clock()
    model, observer, rule = federation.model, federation.observer, federation.participation
    form = CommonForm(before, *_upload_specs(federation, round_))
    spool = Spool(federation.spool, round_, form)
    admission = Admission(
        federation.transport,
        rule,
        form,
        holdings,
        federation.base,
        spool,
        federation.access,
        federation.rule.client.memory if federation.rule.client else "none",
        federation.metrics,
        holders=model is None,
        exact_holders=federation.exact_holders,
    )
    with clock.phase("ship"), writing(spool.path):  # step 1: who takes part is asked
        for fault in admission.draw(federation.seed):
            observer.passed_over(fault)
        admission.ask()
    with clock.phase("train"), writing(spool.path):  # steps 2 and 3: admitted, and on disk
        intake = admission.receive(partial(observer.training, round_))
    if federation.screening is not None:
        observer.phase(round_, "screen")
        with clock.phase("screen"):
            screen(federation.screening, intake, form)
    require_enough(intake, rule, round_)
    observer.phase(round_, "aggregate")
    held = holdings.changes(before.version, intake.landed, intake.lost)
    sink = _sink(federation, before, holdings, intake, held)
    with clock.phase("aggregate"), closing(sink):  # steps 4 and 5, module by module
        fresh = partial(federation.fresh, seed=derive_seed(federation.seed, round_, ""))
        reducer = Reducer(
            form,
            federation.rule,
            fresh,
            federation.seed,
            intake.stay,
            federation.device,
            holdings.history.store.memory(before.version) if federation.rule.remembers else {},
        )
        counted = [WeightedUpdate(x, x.weight) for x in intake.updates]
        reduction = reducer.reduce(counted, sink, held)
        federation.keep(intake.updates)
    with clock.phase("apply"):  # step 6
        state = before.advance([reduction.step])
        if model is not None:
            model.apply(state)
    with clock.phase("certify"):  # step 7
        certificate = _certified(federation, state, reduction)
        if federation.rule.certified and not (model is not None and model.lossy_fold):
            enforce(certificate, round_, partial(strained, intake, form))
    metrics: Mapping[str, float] = {}
    with clock.phase("evaluate"):
        if federation.scored is None or federation.scored(round_):
            observer.phase(round_, "evaluate")
            metrics = federation.evaluate(state)
    after = holdings.after(reduction.step, held)
    record = _record(federation, round_, intake, certificate, metrics, clock.seconds)
    return state, after, record  # step 8, making both durable, is the run's


def _certified(federation: Federation, state: GlobalState, reduction: Reduction) -> Certificate:
    """Both halves, or the step's alone where clients hold the models."""
    if federation.model is None:
        return certify_step(federation.spec, state, reduction)
    from fedexlora.rounds.certificate import certify

    return certify(
        federation.model,
        state,
        reduction,
        federation.specs,
        federation.forwards,
        makes_up=federation.rule.makes_up,
    )


def _sink(
    federation: Federation,
    before: GlobalState,
    holdings: Holdings,
    intake: Intake,
    held: Mapping[str, int | None],
) -> StepSink:
    """What takes in the round's step."""
    kept, shared = each_once(federation.specs)
    owners = {client: client for client in kept} | shared
    if federation.rule.own_adapters:
        owners = {update.client: update.client for update in intake.updates}
    rule = federation.rule
    letters = rule.steps(before.version + 1)
    return holdings.history.store.sink(before, letters, owners, held, remembers=rule.remembers)


def _upload_specs(
    federation: Federation, round_: int
) -> tuple[AdapterSpec, Mapping[str, AdapterSpec]]:
    """What updates of a round contain: of all clients, and of those with an adapter of their own.

    Specs that clients share stay one object.
    """
    kept, shared = each_once(federation.specs)
    own = {client: federation.rule.upload_spec(spec, round_) for client, spec in kept.items()}
    own |= {client: own[name] for client, name in shared.items()}
    return federation.rule.upload_spec(federation.spec, round_), own


def _record(
    federation: Federation,
    round_: int,
    intake: Intake,
    certificate: Certificate,
    metrics: Mapping[str, float],
    seconds: Mapping[str, float],
) -> RoundRecord:
    whole, place = intake.weight, intake.in_draw()
    clients = tuple(
        update.record.model_copy(update={"weight": update.weight / whole})
        for update in sorted(intake.updates, key=lambda x: place(x.client))
    )
    up = sum(c.uploaded_bytes for c in clients) + sum(c.uploaded_bytes for c in intake.left_out)
    # Not of the left out alone: a client that sends twice is listed twice, and downloads once.
    down = sum(intake.downloads.values())
    in_time = [x for x in clients if x.staleness == 0]
    holders = {x.client: x.holder for x in in_time if x.holder is not None}
    scores = [x.scores for x in in_time if x.scores is not None]
    return RoundRecord(
        round=round_,
        registered=len(federation.transport.clients),
        method=federation.method,
        clients=clients,
        left_out=tuple(intake.left_out),
        stay=intake.stay / whole,
        bytes=BytesRecord(up=up, down=down),
        deviation=certificate.deviation,
        certificate=certificate.overall,
        modules=certificate.modules,
        # In the order in which the store gives them back: records are the same to the byte.
        metrics=dict(sorted(metrics.items())),
        scores=taken_together(round_ - 1, scores) if scores else None,
        holders=worst_of(round_ - 1, holders) if holders else None,
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
