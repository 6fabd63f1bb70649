"""A recipe's run on the nodes of a Flower federation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from flwr.serverapp import Grid
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedexlora.errors import RecipeError
from fedexlora.exchange.records import RoundRecord, score_text
from fedexlora.exchange.update import largest_update
from fedexlora.flower import names
from fedexlora.flower.coordinator import begun, check_coordinator
from fedexlora.flower.names import Names
from fedexlora.flower.node import recipe_for_nodes
from fedexlora.flower.run_id import run_id
from fedexlora.flower.transport import FlowerTransport
from fedexlora.rounds.folder import Progress, RunFolder
from fedexlora.rounds.loop import RunResult, run_federation
from fedexlora.rounds.observer import Observer, RunInfo
from fedexlora.rounds.prepared import Prepared, check_clients, refuse_one_place
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.tracking import check_trackers, tracked

_log = logging.getLogger(__name__)


class Settings(BaseModel):
    """What the server's operator says of a run, beside the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    out: Path
    """The run's folder, on the server."""
    nodes: int = Field(default=2, ge=1)
    """How many nodes to wait for before the first round."""
    wait: float = Field(default=600.0, gt=0)
    """For how many seconds."""
    keep_updates: bool = False
    """Store what every client sent, as PEFT adapters."""
    resume: bool = True
    """Continue the run in ``out``, if there is one."""
    authenticated: bool = True
    """Whether the SuperLink lets in registered keys only (``--enable-supernode-auth``), which
    Flower does not tell: a client's name then belongs to the key that had it first in the run.
    Without, every start of a node is another key, and whoever connects may be any client."""

    @staticmethod
    def of(config: Mapping[str, object]) -> Settings:
        """The settings of Flower's run configuration.

        Raises:
            RecipeError: with every unknown key and invalid value.
        """
        try:
            return Settings.model_validate({k.replace("-", "_"): v for k, v in config.items()})
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise RecipeError("the run configuration of the app is wrong", faults) from error


class LogLines(Observer):
    """Says in the log what happens."""

    def preparing(self, what: str) -> None:
        """One line."""
        _log.info("%s", what)

    def passed_over(self, fault: str) -> None:
        """A warning."""
        _log.warning("%s", fault)

    def started(self, info: RunInfo) -> None:
        """Where the run stands."""
        scores = _scores(info.initial_metrics)
        _log.info(
            "%d of %d rounds are done; before round 1: %s", info.finished, info.rounds, scores
        )

    def finished_round(self, record: RoundRecord) -> None:
        """Scores and certificate of a round, and who is not part of it."""
        scores = _scores(record.metrics)
        _log.info(
            "round %d: %d clients, %s, error of the applied update %.1e",
            record.round,
            len(record.clients),
            scores,
            record.certificate.error,
        )
        for out in record.left_out:
            _log.warning(
                "round %d: without %s: %s", record.round, out.client, "; ".join(out.reasons)
            )


def _scores(metrics: Mapping[str, float]) -> str:
    found = ", ".join(f"{name} {score_text(metrics, name)}" for name in metrics)
    return found or "not scored"


def serve(
    grid: Grid, recipe: Recipe, settings: Settings, observer: Observer, *, simulated: bool = False
) -> RunResult:
    """Run a recipe on the nodes of a federation, or continue it.

    Args:
        grid: Flower's.
        recipe: what to run.
        settings: of the run.
        observer: told of progress.
        simulated: whether nodes are processes of this machine that have the recipe themselves.

    Raises:
        InputError: before any node is asked, if the recipe names something that is not there.
        RunError: if too few nodes are ready, or the run stops; its last version is intact.
    """
    if recipe.rule.personal and recipe.evaluation.where != "clients":
        raise RecipeError(
            f"{recipe.method.name} has one model a client; the server has none of them to score",
            ["set evaluation.where = 'clients': each scores its own, and has it at the end"],
        )
    # Without a simulation that is seen to where the server waits for its nodes.
    if simulated and recipe.rule.draws and recipe.evaluation.where != "server":
        check_coordinator(recipe)
    if not simulated:
        refuse_one_place(recipe)
    check_trackers(recipe)
    folder = RunFolder(settings.out)
    continued = folder.check_same(recipe) if settings.resume else folder.check_new()
    owners = Names(folder.path / names.FILE if settings.authenticated and not simulated else None)
    opened = _with_model if simulated or recipe.evaluation.where == "server" else _without_model
    prepared, transport = opened(grid, recipe, settings, owners, observer, simulated)
    check_clients(recipe, transport.clients)

    def connect(progress: Progress) -> FlowerTransport:
        del progress  # what nodes hold is on their own disks
        owners.keep()
        transport.run = run_id(folder.path)
        return transport

    with tracked(recipe, folder.path, observer) as watching:
        return run_federation(
            prepared,
            folder,
            transport.rows,
            connect,
            continued=continued,
            keep_updates=settings.keep_updates,
            observer=watching,
        )


def _with_model(
    grid: Grid,
    recipe: Recipe,
    settings: Settings,
    owners: Names,
    observer: Observer,
    simulated: bool,
) -> tuple[Prepared, FlowerTransport]:
    """The server loads the model, and waits for nodes whose base is the same."""
    from fedexlora.data.task import stated
    from fedexlora.rounds.preparation import prepare, prepare_server

    prepared = prepare(recipe, observer)[0] if simulated else prepare_server(recipe, observer)
    task = recipe.task if prepared.task is None else stated(prepared.task)
    transport = FlowerTransport(
        grid,
        recipe_for_nodes(recipe, task.model_dump(mode="json", exclude_none=True)),
        prepared.base,
        largest_update=max(map(largest_update, [prepared.spec, *prepared.specs.values()])),
        names=owners,
        access=recipe.access,
    )
    _gather(transport, settings, observer)
    return prepared, transport


def _without_model(
    grid: Grid,
    recipe: Recipe,
    settings: Settings,
    owners: Names,
    observer: Observer,
    simulated: bool,
) -> tuple[Prepared, FlowerTransport]:
    """The server waits for nodes, and begins with what they agree on."""
    del simulated
    check_coordinator(recipe)
    task = recipe.task.model_dump(mode="json", exclude_none=True)
    sent = recipe_for_nodes(recipe, task)
    transport = FlowerTransport(grid, sent, None, names=owners, access=recipe.access)
    _gather(transport, settings, observer)
    observer.preparing("taking version 0 from a client")
    prepared = begun(recipe, transport, settings.wait)
    transport.expect(largest_update(prepared.spec))
    return prepared, transport


def _gather(transport: FlowerTransport, settings: Settings, observer: Observer) -> None:
    observer.preparing(f"waiting for {settings.nodes} clients")
    transport.gather(settings.nodes, settings.wait)
