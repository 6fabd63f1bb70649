"""The rounds of a run, whatever reaches its clients, and all that is written of them."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedexlora.errors import BridgeError, RecipeError, ResumeError
from fedexlora.exchange.files import new_folder, replace_bytes, writing
from fedexlora.exchange.history import History, Holdings
from fedexlora.exchange.records import RoundRecord
from fedexlora.exchange.state import GlobalState
from fedexlora.local.arguments import training_arithmetic
from fedexlora.local.memory import ClientMemory
from fedexlora.peft_bridge.export import save_factors, save_global
from fedexlora.rounds.divergence import check_finite, check_score
from fedexlora.rounds.environment import (
    describe_environment,
    device_of,
    environment_changes,
    resumed_header,
)
from fedexlora.rounds.folder import Progress, RunFolder
from fedexlora.rounds.observer import Observer, RunInfo
from fedexlora.rounds.personal import personal_adapters
from fedexlora.rounds.preparation import Prepared
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.round import Federation, run_round
from fedexlora.rounds.scoring import all_scorers, scoring_arithmetic
from fedexlora.rounds.spool import SpooledUpdate
from fedexlora.rounds.transport import Transport

Connect = Callable[[Progress], Transport]
"""Makes the transport of a run that stands where it does."""


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


def run_federation(
    prepared: Prepared,
    folder: RunFolder,
    rows: Mapping[str, int],
    connect: Connect,
    *,
    continued: bool,
    keep_updates: bool,
    observer: Observer,
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

    Raises:
        InputError: before anything is written, if the folder holds another run, or updates cannot
            be kept.
        RunError: if the run stops; its last version is intact.
    """
    if keep_updates:
        _check_keep(prepared)
    recipe = prepared.recipe
    _check_enough_clients(recipe, rows)
    with folder.locked():
        header = folder.read_header() if continued else None
        _check_header(folder, header, prepared)
        progress = folder.load(recipe.federation.history) if continued else None
        _check_rounds(progress, recipe)
        folder.start(recipe)
        for fault in progress.damaged.values() if progress else ():
            observer.passed_over(fault)
        if header is None:
            observer.preparing("scoring the model before round 1")
            header = _header(prepared, rows, prepared.evaluate(observer))
            check_score("before round 1", header["initial_metrics"], ())
            folder.write_header(header)
        elif changes := environment_changes(header, prepared.model):
            for change in changes:
                observer.note(f"resumed with other software or hardware: {change}")
            finished = progress.state.version if progress else 0
            header = resumed_header(header, finished, prepared.model)
            folder.write_header(header)
        with settled_heap():
            records = _rounds(prepared, folder, progress, header, connect, keep_updates, observer)
    metrics, precision = header["initial_metrics"], header["precision"]
    adapter = folder.adapters if recipe.rule.personal else folder.adapter
    return RunResult(folder.path, adapter, metrics, precision, records)


def _rounds(
    prepared: Prepared,
    folder: RunFolder,
    progress: Progress | None,
    header: Mapping[str, Any],
    connect: Connect,
    keep_updates: bool,
    observer: Observer,
) -> Sequence[RoundRecord]:
    """Run what is left of the rounds and write the adapter."""
    recipe, model = prepared.recipe, prepared.model
    if progress is None:
        initial = model.initial_state(prepared.specs, recipe.federation.seed)
        history = History(recipe.federation.history, folder.store, {0: initial.id})
        progress = Progress(initial, (), Holdings({}, history))
        folder.begin(initial, progress.holdings)
    else:
        folder.settle(progress)
    state, holdings = progress.state, progress.holdings
    model.apply(state)
    observer.started(_info(prepared, header, len(progress.records)))
    keep = partial(_keep, folder, prepared) if keep_updates else _forget
    federation = Federation(
        method=recipe.method.name,
        rule=recipe.rule,
        model=model,
        specs=prepared.specs,
        seed=recipe.federation.seed,
        transport=connect(progress),
        participation=recipe.participation,
        evaluate=partial(prepared.evaluate, observer),
        spool=folder.spool,
        keep=keep,
        observer=observer,
        access=recipe.access,
        device=torch.device(recipe.federation.reduce_on),
        screening=recipe.screening,
        forwards=prepared.forwards,
        scored=recipe.scored,
    )
    while state.version < recipe.federation.rounds:
        shutil.rmtree(folder.round_updates(state.version + 1), ignore_errors=True)
        state, holdings, record = run_round(federation, state, holdings)
        check_finite(state, record)
        folder.save(state, holdings, record)
        observer.finished_round(record)
    folder.clear_spool()
    if recipe.rule.personal:
        _save_personal(prepared, folder, state)
        return folder.read_records(recipe.federation.rounds)
    with writing(folder.adapter), new_folder(folder.adapter) as path:
        written = save_global(model, state, path)
    worst = {"worst_module": written.module, "worst_error": written.error}
    with writing(folder.path / "adapter.json"):
        replace_bytes(folder.path / "adapter.json", json.dumps(worst, indent=2).encode())
    return folder.read_records(recipe.federation.rounds)


def _save_personal(prepared: Prepared, folder: RunFolder, state: GlobalState) -> None:
    """Write the adapters of the clients whose memory is here, where each has a model of its own."""
    found = personal_adapters(prepared.recipe.rule, state, ClientMemory(folder.memory))
    with writing(folder.adapters), new_folder(folder.adapters) as path:
        for client, own in found.items():
            (path / client).mkdir()
            spec = prepared.specs.get(client)
            save_factors(prepared.model, own.factors, own.heads, path / client, spec)


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


def _check_enough_clients(recipe: Recipe, clients: Mapping[str, int]) -> None:
    """Refuse a rule against bad updates that rounds have too few clients for."""
    asked = recipe.participation.sample(tuple(clients), recipe.federation.seed, 1)
    if recipe.screening is not None and (short := recipe.screening.shortfall(len(asked))):
        raise RecipeError("a round has too few clients", [f"federation.robust: {short}"])


def _check_keep(prepared: Prepared) -> None:
    """Refuse to keep updates from which nobody could recompute the aggregate."""
    if prepared.model.taken_out:
        raise BridgeError(
            "--keep-updates: factors on a base that their initialisation changed are no adapters",
            ["leave it out, or set lora.init_lora_weights = true"],
        )
    if not prepared.recipe.rule.uploads(1):
        raise RecipeError(
            f"--keep-updates: clients of {prepared.recipe.method.name} send no adapters",
            ["leave it out; each one's is in the run's folder adapters at the end"],
        )
    if prepared.recipe.federation.stale == "accept":
        raise RecipeError(
            "--keep-updates: a late update is a change of an earlier version, not an adapter",
            ["leave it out, or set federation.stale = 'refuse'"],
        )
    if prepared.recipe.federation.robust == "clip":
        raise RecipeError(
            "--keep-updates: a clipped update counts in part, and no adapter holds the rest",
            ["leave it out, or choose another federation.robust"],
        )


def _keep(folder: RunFolder, prepared: Prepared, updates: Sequence[SpooledUpdate]) -> None:
    """Store what clients sent so that anyone can recompute the aggregate without our code."""
    for update in updates:
        sent = update.form.sent(update)
        dense = {name: update.head(name) for name in update.form.before.dense}
        round_ = update.form.before.version + 1
        kept = folder.round_updates(round_) / update.client
        with writing(kept), new_folder(kept) as path:
            save_factors(prepared.model, sent, dense, path, prepared.specs.get(update.client))
            said = {"client": update.client, "round": round_, "weight": update.weight}
            (path / "client.json").write_text(json.dumps(said, indent=2), encoding="utf-8")


def _forget(updates: Sequence[SpooledUpdate]) -> None:
    """Keep nothing of the updates."""


def _check_header(folder: RunFolder, header: Mapping[str, Any] | None, prepared: Prepared) -> None:
    if header is None:
        return
    here = {"data": prepared.data_fingerprint, "base": prepared.model.base_fingerprint}
    faults = [
        f"{key}: {header.get(key)} there, {value} here"
        for key, value in here.items()
        if header.get(key) != value
    ]
    if faults:
        raise ResumeError(f"{folder.path} was started on other data or another base model", faults)


def _check_rounds(progress: Progress | None, recipe: Recipe) -> None:
    if progress is not None and progress.state.version > recipe.federation.rounds:
        raise ResumeError(
            f"the run has finished {progress.state.version} rounds already",
            [f"federation.rounds: expected at least that, found {recipe.federation.rounds}"],
        )


def _header(
    prepared: Prepared, rows: Mapping[str, int], initial_metrics: Mapping[str, float]
) -> dict[str, Any]:
    """What holds for the whole run and is not in its recipe."""
    return {
        **describe_environment(prepared.model),
        "data": prepared.data_fingerprint,
        "base": prepared.model.base_fingerprint,
        "precision": prepared.model.precision(),
        "arithmetic": {
            "training": str(training_arithmetic(prepared.recipe.training)),
            "scoring": str(scoring_arithmetic(prepared.recipe)),
        },
        "clients": dict(rows),
        **prepared.summary.record(),
        "validation_rows": len(prepared.validation),
        "headline": prepared.recipe.headline,
        "scorers": all_scorers(prepared.recipe),
        "model_config": dict(prepared.task.model_config),
        "initial_metrics": dict(initial_metrics),
    }


def _info(prepared: Prepared, header: Mapping[str, Any], finished: int) -> RunInfo:
    parameters = prepared.model.peft_model.parameters()
    return RunInfo(
        method=prepared.recipe.method.name,
        rounds=prepared.recipe.federation.rounds,
        clients=header["clients"],
        validation_rows=header["validation_rows"],
        modules=len(prepared.model.modules),
        precision=header["precision"],
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        headline=header["headline"],
        initial_metrics=header["initial_metrics"],
        finished=finished,
        device=str(device_of(prepared.model)),
    )
