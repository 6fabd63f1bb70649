"""Many clients of one recipe in several processes, by Flower's simulation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecordValues, Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedexlora.engine.conduct import RunResult
from fedexlora.engine.local import LocalTrainer
from fedexlora.engine.observer import Observer
from fedexlora.engine.prepare import client_rows, prepare
from fedexlora.engine.recipe import Recipe, load_recipe, parse_recipe
from fedexlora.errors import RecipeError, RunError
from fedexlora.exchange.shipment import receive, receive_own
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.untrusted import number
from fedexlora.flower.apps import client_app
from fedexlora.flower.frames import Frame
from fedexlora.flower.server import Settings, serve


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

    Updates are added up in the order of the clients, as by :func:`fedexlora.engine.run.run`. Each
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
        RunError: if the run stops; its last checkpoint is intact.
    """
    taken = resources or Resources()
    count = len(client_rows(recipe))
    settings = Settings(
        out=out, nodes=count, keep_updates=keep_updates, resume=resume, in_order=True
    )
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
    run_simulation(app, client_app(), count, backend_config={"client_resources": used})
    if failed:
        raise failed[0]
    if not done:
        raise RunError("Flower's simulation ended before the run did; its log says why")
    return done[0]


@dataclass(slots=True)
class _Resident:
    """What one of the simulation's processes keeps: a model for all clients."""

    recipe: Mapping[str, Any]
    trainer: LocalTrainer
    held: tuple[bytes, GlobalState] | None = field(default=None)


_RESIDENT: list[_Resident] = []


def simulated(partition: int, frame: Frame, recipe: Path | None = None) -> Frame:
    """The answer of the client with this number, from 0.

    Args:
        partition: its number in the recipe's partition.
        frame: the server's request.
        recipe: where to read ``[data]``, if the server sent none.

    Raises:
        RunError: if the client cannot train.
        InputError: if the recipe names something that is not there.
    """
    resident = _resident(frame.header["recipe"], recipe)
    client = list(resident.trainer.num_examples)[partition]
    if frame.header["kind"] == "hello":
        return Frame({"client": client, "rows": resident.trainer.num_examples[client]})
    message = frame.parts["message"]
    if resident.held is None or resident.held[0] != message:
        try:
            resident.held = message, receive(None, message)
        except RunError as error:  # a piece, from a time when the clients were nodes with disks
            return Frame({"missed": str(error)})
    state = resident.held[1]
    if "own" in frame.parts:
        state = receive_own(state, client, frame.parts["own"])
    round_ = number(frame.header, "round")
    started = time.perf_counter()
    update = resident.trainer.update(client, state, round_, lambda *_: None)
    seconds = time.perf_counter() - started
    return Frame({"seconds": seconds, "keeps": False}, {"update": update})


def _resident(sent: Mapping[str, Any], recipe: Path | None) -> _Resident:
    if not _RESIDENT or _RESIDENT[0].recipe != sent:
        _RESIDENT.clear()
        _, trainer = prepare(_whole(sent, recipe), Observer())
        _RESIDENT.append(_Resident(sent, trainer))
    return _RESIDENT[0]


def _whole(sent: Mapping[str, Any], recipe: Path | None) -> Recipe:
    """The server's recipe with data: its own, or that of the app on this machine."""
    if "data" in sent:
        return Recipe.model_validate(sent)
    if recipe is None:
        raise RecipeError(
            "the server sends no data, and this app names none for simulated clients",
            ["give client_app the app's recipe"],
        )
    data = load_recipe(recipe).model_dump(mode="json", include={"data"}, exclude_none=True)
    return parse_recipe({**sent, **data}, "of the server")
