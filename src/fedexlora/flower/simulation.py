"""Many clients of one recipe in several processes, by Flower's simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecordValues, Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedexlora.errors import RunError
from fedexlora.flower.apps import client_app
from fedexlora.flower.server import Settings, serve
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.loop import RunResult
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import client_rows
from fedexlora.rounds.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Resources:
    """What one simulated client at work takes up; so many work side by side."""

    cpus: int = 1
    gpus: float = 0.0


def simulate(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    keep_updates: bool = False,
    resources: Resources | None = None,
    observer: Observer | None = None,
) -> RunResult:
    """Run a recipe with its clients in Flower's simulation, which is Ray's processes.

    Updates are added up in the order of the clients, as by :func:`fedexlora.rounds.run.run`. Each
    process loads the model once.

    Args:
        recipe: what to run.
        out: the run's folder; empty or absent, unless ``resume``.
        resume: continue the run in ``out``; start it if there is none.
        keep_updates: also store what every client sent, as PEFT adapters.
        resources: of one client.
        observer: told of progress.

    Raises:
        InputError: before anything is written, if the recipe names something that is not there.
        RunError: if the run stops; its last version is intact.
    """
    taken = resources or Resources()
    count = len(client_rows(recipe))
    settings = Settings(out=out, nodes=count, keep_updates=keep_updates, resume=resume)
    done: list[RunResult] = []
    failed: list[BaseException] = []

    def main(grid: Grid, context: Context) -> None:
        del context
        try:
            done.append(serve(grid, recipe, settings, observer or Observer(), simulated=True))
        except BaseException as error:  # noqa: BLE001 - Flower would log it and say nothing
            failed.append(error)

    app = ServerApp()
    app.main()(main)
    used: dict[str, ConfigRecordValues] = {"num_cpus": taken.cpus, "num_gpus": taken.gpus}
    # A client's reply says what kind of fault it met, and Ray's own log files have the rest.
    quiet: dict[str, ConfigRecordValues] = {"log_to_driver": False}
    backend = {"client_resources": used, "init_args": quiet}
    run_simulation(app, client_app(recipe, RunFolder(out).memory), count, backend_config=backend)
    if failed:
        raise failed[0]
    if not done:
        raise RunError("Flower's simulation ended before the run did; its log says why")
    return done[0]
