"""``fedexlora run``: a recipe, from data to adapter."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedexlora.engine.quiet import quiet_libraries
from fedexlora.errors import RecipeError

if TYPE_CHECKING:
    from fedexlora.engine.conduct import RunResult


class Engine(StrEnum):
    """What runs the clients."""

    LOCAL = "local"
    FLOWER = "flower"


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, in TOML.", metavar="RECIPE.toml")],
    out: Annotated[Path, typer.Option("--out", help="The run's folder.", metavar="DIR")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a value of the recipe.", metavar="table.key=value"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, or start it.")
    ] = False,
    keep_updates: Annotated[
        bool,
        typer.Option("--keep-updates", help="Store what every client sent, as PEFT adapters."),
    ] = False,
    engine: Annotated[
        Engine,
        typer.Option("--engine", help="One process, or Flower's simulation in several."),
    ] = Engine.LOCAL,
    client_cpus: Annotated[
        int,
        typer.Option("--client-cpus", help="With flower: processors of one client.", min=1),
    ] = 1,
    client_gpus: Annotated[
        float,
        typer.Option("--client-gpus", help="With flower: share of a GPU of one client.", min=0.0),
    ] = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each round's record as one line of JSON.")
    ] = False,
) -> None:
    """Fine-tune one model on many clients' data; the result is one PEFT adapter."""
    quiet_libraries()
    from fedexlora.cli.terminal import JsonLines, Terminal, closing
    from fedexlora.engine.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    # Every client's training ends in a full collection; it need not go through all libraries.
    gc.freeze()
    play = _player(engine, client_cpus, client_gpus)
    if as_json:
        play(loaded, out, resume=resume, keep_updates=keep_updates, observer=JsonLines())
        return
    with Terminal() as terminal:
        result = play(loaded, out, resume=resume, keep_updates=keep_updates, observer=terminal)
    closing(result, loaded)


def _player(engine: Engine, cpus: int, gpus: float) -> Callable[..., RunResult]:
    if engine is Engine.LOCAL:
        from fedexlora.engine.run import run as local

        return local
    if find_spec("flwr") is None or find_spec("ray") is None:
        raise RecipeError(
            "--engine flower needs Flower's simulation", ["pip install 'fedexlora[simulation]'"]
        )
    from fedexlora.flower.simulation import Resources, simulate

    logging.getLogger("flwr").setLevel(logging.ERROR)
    return partial(simulate, resources=Resources(cpus, gpus))
