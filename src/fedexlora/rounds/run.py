"""A run in this process: every client, one after the other, around one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedexlora.exchange.state import GlobalState
from fedexlora.local.clients import LocalClients
from fedexlora.local.memory import ClientMemory
from fedexlora.rounds.folder import Progress, RunFolder
from fedexlora.rounds.in_process import InProcessTransport
from fedexlora.rounds.loop import RunResult, Scores, run_federation, settled_heap
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.personal import mean_of_clients
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.prepared import Prepared
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.tracking import check_trackers, tracked


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    keep_updates: bool = False,
    observer: Observer | None = None,
) -> RunResult:
    """Fine-tune one model on many clients' data, all in this process.

    Args:
        recipe: what to run.
        out: the run's folder; empty or absent, unless ``resume``.
        resume: continue the run in ``out``; start it if there is none.
        keep_updates: also store what every client sent, as PEFT adapters under ``updates/``.
        observer: told of progress.

    Raises:
        InputError: before anything is written, if the recipe names something that is not there or
            cannot be aggregated exactly, or ``out`` holds something else.
        RunError: if the run stops; its last version is intact.
    """
    check_trackers(recipe)
    observer = observer or Observer()
    folder, table = RunFolder(Path(out)), recipe.federation
    continued = folder.check_same(recipe) if resume else folder.check_new()
    prepared, trainer = prepare(recipe, observer)
    observer.preparing("rehearsing a step")
    with settled_heap():
        trainer.rehearse()

    def connect(progress: Progress) -> InProcessTransport:
        return InProcessTransport(
            trainer,
            held=progress.holdings.ids(),
            keep_late=table.stale == "accept",
            memory=ClientMemory(folder.memory),
        )

    with tracked(recipe, folder.path, observer) as watching:
        return run_federation(
            prepared,
            folder,
            trainer.num_examples,
            connect,
            continued=continued,
            keep_updates=keep_updates,
            observer=watching,
            scores=_personal_scores(prepared, trainer, folder, watching),
            resident=trainer.model,
        )


def _personal_scores(
    prepared: Prepared, clients: LocalClients, folder: RunFolder, observer: Observer
) -> Scores | None:
    """Of a method with one model a client, the mean of all clients' scores on the server's rows."""
    scoring, model = prepared.scoring, prepared.model
    if not prepared.recipe.rule.personal or scoring is None or model is None:
        return None

    def scores(state: GlobalState) -> Mapping[str, float]:
        held = dict.fromkeys(clients.num_examples, state)
        memory = ClientMemory(folder.memory)
        found = mean_of_clients(scoring, clients, held, observer, memory)
        model.enter(state)
        return found

    return scores
