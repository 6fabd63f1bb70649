"""A run in this process: every client, one after the other, around one model."""

from __future__ import annotations

from pathlib import Path

from fedexlora.local.memory import ClientMemory
from fedexlora.rounds.folder import Progress, RunFolder
from fedexlora.rounds.in_process import InProcessTransport
from fedexlora.rounds.loop import RunResult, run_federation, settled_heap
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.recipe import Recipe


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

    return run_federation(
        prepared,
        folder,
        trainer.num_examples,
        connect,
        continued=continued,
        keep_updates=keep_updates,
        observer=observer,
    )
