"""Who watches a run: the terminal, a log, a test."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedexlora.exchange.records import FinishRecord, RoundRecord


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is known before the first round."""

    method: str
    rounds: int
    clients: Mapping[str, int]
    """Training rows by client."""
    validation_rows: int
    modules: int
    precision: str
    """How the adapted frozen weights are stored."""
    trained_parameters: int
    headline: str
    """The metric that the run is judged by."""
    initial_metrics: Mapping[str, float]
    """Scores of the model before round 1."""
    finished: int
    """Rounds that were finished before, when a run is resumed."""
    device: str
    """Where the model is, trained and scored."""


_log = logging.getLogger(__name__)


class Observer:
    """Told what happens while it happens; never part of the result. This one logs notes only."""

    def preparing(self, what: str) -> None:
        """Something that takes a while before the first round."""

    def note(self, what: str) -> None:
        """Something of the data or the model that is no fault, and that users should know."""
        _log.info("%s", what)

    def passed_over(self, fault: str) -> None:
        """A damaged file of the store was passed over."""

    def started(self, info: RunInfo) -> None:
        """The rounds are about to begin."""

    def training(self, round_: int, client: str, step: int, steps: int) -> None:
        """A client has done one optimizer step."""

    def phase(self, round_: int, what: str) -> None:
        """A round has come to ``aggregate`` or ``evaluate``; after the last one, ``finish``."""

    def evaluating(self, done: int, batches: int) -> None:
        """The global model has scored ``done`` of ``batches`` batches."""

    def finished_round(self, record: RoundRecord) -> None:
        """A round is recorded and durable."""

    def finished_run(self, record: FinishRecord) -> None:
        """Clients have come to the final version, where they score."""


class Observers(Observer):
    """Several observers as one, each told in turn of everything that an observer is told of."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers


def _told_to_all(name: str) -> Callable[..., None]:
    def tell(self: Observers, *values: object) -> None:
        for observer in self.observers:
            getattr(observer, name)(*values)

    return tell


for _name in [name for name in vars(Observer) if not name.startswith("_")]:
    setattr(Observers, _name, _told_to_all(_name))
