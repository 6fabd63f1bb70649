"""The rounds of a run, whatever reaches its clients, and all that is written of them."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedexlora.errors import RecipeError, ResumeError
from fedexlora.exchange.history import History, Holdings
from fedexlora.exchange.records import FinishRecord, RoundRecord
from fedexlora.exchange.scores import scores_by_version
from fedexlora.exchange.state import GlobalState
from fedexlora.rounds.best import BestVersion, Selection
from fedexlora.rounds.divergence import check_finite, check_score
from fedexlora.rounds.environment import (
    environment_changes,
    resumed_header,
)
from fedexlora.rounds.finish import Finish
from fedexlora.rounds.folder import Progress, RunFolder
from fedexlora.rounds.header import check_header, run_header, run_info
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.prepared import Prepared
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.round import Federation, run_round
from fedexlora.rounds.transport import Transport
from fedexlora.rounds.written import (
    check_keep,
    forget_sent,
    keep_sent,
    write_adapters,
    write_personal,
)

if TYPE_CHECKING:  # it needs PEFT, which a server without a model has not
    from fedexlora.peft_bridge.model import AdaptedModel

Connect = Callable[[Progress], Transport]
"""Makes the transport of a run that stands where it does."""
Scores = Callable[[GlobalState], Mapping[str, float]]
"""Scores of a version."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run."""

    folder: Path
    adapter: Path
    """The final global model as a PEFT adapter; of a method without one, the folder of those of its
    clients."""
    initial_metrics: Mapping[str, float]
    precision: str
    """How the adapted frozen weights are stored."""
    records: Sequence[RoundRecord]
    """Read from the folder one at a time."""
    finish: FinishRecord | None = None
    """Where clients score: what followed the last round."""
    best: BestVersion | None = None
    """The version with the best headline score, whose adapter lies beside the final one."""

    def scores(self) -> dict[int, dict[str, float]]:
        """By version that was scored, by the server or by the clients: its scores."""
        return scores_by_version(self.initial_metrics, self.records, self.finish)


def run_federation(
    prepared: Prepared,
    folder: RunFolder,
    rows: Mapping[str, int],
    connect: Connect,
    *,
    continued: bool,
    keep_updates: bool,
    observer: Observer,
    scores: Scores | None = None,
    resident: AdaptedModel | None = None,
) -> RunResult:
    """Run what is left of a run's rounds, and write its adapter.

    Args:
        prepared: the server's side of the recipe.
        folder: the run's, checked by its ``check_new`` or ``check_same``.
        rows: training rows by client, as far as they are known.
        connect: makes the transport.
        continued: whether there is a run in the folder.
        keep_updates: also store what every client sent, as PEFT adapters.
        observer: told of progress.
        scores: of a version that the server's model is at; by default those of that model.
        resident: the model of clients in this process.

    Raises:
        InputError: before anything is written, if the folder holds another run, or updates cannot
            be kept.
        RunError: if the run stops; its last version is intact.
    """
    if keep_updates:
        check_keep(prepared)
    recipe = prepared.recipe
    check_enough_clients(recipe, rows)
    with folder.locked():
        header = folder.read_header() if continued else None
        check_header(folder, header, prepared)
        progress = folder.load(recipe.federation.history) if continued else None
        _check_rounds(progress, recipe)
        folder.start(recipe)
        for fault in progress.damaged.values() if progress else ():
            observer.passed_over(fault)
        if header is None:
            observer.preparing("scoring the model before round 1")
            header = run_header(prepared, rows, prepared.evaluate(observer))
            check_score("before round 1", header["initial_metrics"], ())
            folder.write_header(header)
        elif changes := environment_changes(header, prepared.model):
            for change in changes:
                observer.note(f"resumed with other software or hardware: {change}")
            finished = progress.state.version if progress else 0
            header = resumed_header(header, finished, prepared.model)
            folder.write_header(header)
        with settled_heap():
            records, best = _rounds(
                prepared,
                folder,
                progress,
                header,
                connect,
                scores or (lambda _: prepared.evaluate(observer)),
                keep_updates,
                observer,
                resident,
            )
    metrics, precision = header["initial_metrics"], header["precision"]
    finish = folder.read_finish() if recipe.client_metrics else None
    adapter = folder.adapters if recipe.rule.personal else folder.adapter
    return RunResult(folder.path, adapter, metrics, precision, records, finish, best)


def _rounds(
    prepared: Prepared,
    folder: RunFolder,
    progress: Progress | None,
    header: Mapping[str, Any],
    connect: Connect,
    scores: Scores,
    keep_updates: bool,
    observer: Observer,
    resident: AdaptedModel | None,
) -> tuple[Sequence[RoundRecord], BestVersion | None]:
    """Run what is left of the rounds and write the adapters; the records, and the best version."""
    recipe, model = prepared.recipe, prepared.model
    records = progress.records if progress else ()
    selection = Selection.of(recipe, header["initial_metrics"], records)
    if progress is None:
        initial = prepared.initial()
        history = History(recipe.federation.history, folder.store, {0: initial.id})
        progress = Progress(initial, (), Holdings({}, history))
        folder.begin(initial, progress.holdings)
    else:
        folder.settle(progress, selection.kept)
    state, holdings = progress.state, progress.holdings
    if model is not None:
        model.apply(state)
    observer.started(run_info(prepared, header, len(progress.records)))
    keep = partial(keep_sent, folder, prepared) if keep_updates else forget_sent
    federation = Federation(
        method=recipe.method.name,
        rule=recipe.rule,
        model=model,
        specs=prepared.specs,
        seed=recipe.federation.seed,
        transport=connect(progress),
        participation=recipe.participation,
        evaluate=scores,
        spool=folder.spool,
        keep=keep,
        observer=observer,
        access=recipe.access,
        device=torch.device(recipe.federation.reduce_on),
        screening=recipe.screening,
        forwards=prepared.forwards,
        scored=recipe.scored,
        metrics=recipe.metrics_of,
        origin=prepared.origin,
        exact_holders=recipe.rule.certified and recipe.federation.placement != "fold",
        resident=resident,
    )
    while state.version < recipe.federation.rounds and not selection.exhausted:
        shutil.rmtree(folder.round_updates(state.version + 1), ignore_errors=True)
        state, holdings, record = run_round(federation, state, holdings)
        check_finite(state, record)
        selection.see_round(record)
        folder.save(state, holdings, record, selection.kept)
        observer.finished_round(record)
    folder.clear_spool()
    # Before the final version is scored: a run that its patience has ended goes on with no round.
    stopped = state.version < recipe.federation.rounds
    if recipe.client_metrics:
        finish = _finish(federation, folder, state, holdings, recipe.client_metrics)
        selection.see_finish(finish)
    if recipe.rule.personal:
        write_personal(prepared, folder, state)
        return folder.read_records(state.version), None
    write_adapters(prepared.layout, folder, state, selection, observer, stopped=stopped)
    return folder.read_records(state.version), selection.best


def _finish(
    federation: Federation,
    folder: RunFolder,
    state: GlobalState,
    holdings: Holdings,
    metrics: Collection[str],
) -> FinishRecord:
    """Have the clients of the last round score the final version, unless they have."""
    done = folder.read_finish()
    if done is not None and done.version == state.version:
        return done
    last = folder.read_records(state.version)[-1]
    asked = sorted({x.client for x in last.clients} | {x.client for x in last.left_out})
    if federation.rule.personal:  # each has a model that nobody else has
        asked = sorted(holdings.versions.keys() | set(asked))
    federation.observer.phase(state.version, "finish")
    deadline = federation.participation.deadline
    finish = Finish(federation.transport, state, holdings, federation.base, metrics, deadline)
    record = finish.record(asked)
    folder.write_finish(record)
    federation.observer.finished_run(record)
    return record


@contextmanager
def settled_heap() -> Iterator[None]:
    """Leave everything that is loaded by now out of garbage collection.

    ``Trainer`` collects garbage after every client; walking all of the imported libraries each
    time would take longer than a small client's training.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def check_enough_clients(recipe: Recipe, clients: Mapping[str, int]) -> None:
    """Refuse a rule against bad updates that rounds have too few clients for."""
    asked = recipe.participation.sample(tuple(clients), recipe.federation.seed, 1)
    if recipe.screening is not None and (short := recipe.screening.shortfall(len(asked))):
        raise RecipeError("a round has too few clients", [f"federation.robust: {short}"])


def _check_rounds(progress: Progress | None, recipe: Recipe) -> None:
    if progress is not None and progress.state.version > recipe.federation.rounds:
        raise ResumeError(
            f"the run has finished {progress.state.version} rounds already",
            [f"federation.rounds: expected at least that, found {recipe.federation.rounds}"],
        )
