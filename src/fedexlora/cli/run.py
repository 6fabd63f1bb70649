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

from fedexlora.cli.completion import override
from fedexlora.cli.recipes import check_is_there
from fedexlora.cli.report import add_report
from fedexlora.errors import RecipeError
from fedexlora.local.notices import quiet_libraries
from fedexlora.local.threads import set_threads

if TYPE_CHECKING:
    from fedexlora.rounds.loop import RunResult


class Engine(StrEnum):
    """What runs the clients."""

    LOCAL = "local"
    FLOWER = "flower"


EPILOG = """
Recipes come with the package: get one to start from, change it, and run it.

  fedexlora recipes

  fedexlora recipes --write cola

  fedexlora run cola.toml --out runs/cola --set federation.rounds=5

A checkout has them in recipes/, and docs/recipes.md describes every key.
"""


def run(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE.toml"),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="A new folder for the run: its record, versions, and at the end adapter/ and "
            "report.html.",
            metavar="DIR",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a value of the recipe for this run, e.g. federation.rounds=5; "
            "may be given several times.",
            metavar="table.key=value",
            autocompletion=override,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on after the last finished round of the run in --out, or start it."
        ),
    ] = False,
    keep_updates: Annotated[
        bool,
        typer.Option(
            "--keep-updates",
            help="Also store what every client sent, in updates/ of --out, as PEFT adapters from "
            "which anyone can recompute the result.",
        ),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            help="Processor threads of PyTorch; OMP_NUM_THREADS if not given, or else one for each "
            "processor. They sleep while they wait, unless OMP_WAIT_POLICY says otherwise.",
            min=1,
        ),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            "--engine",
            help="local trains one client after the other in this process; flower trains several "
            "at a time, in Flower's simulation.",
        ),
    ] = Engine.LOCAL,
    client_cpus: Annotated[
        int,
        typer.Option(
            "--client-cpus", help="With --engine flower: processors that one client takes.", min=1
        ),
    ] = 1,
    client_gpus: Annotated[
        float,
        typer.Option(
            "--client-gpus",
            help="With --engine flower: the share of a GPU that one client takes; 0.5 has two "
            "clients share it.",
            min=0.0,
        ),
    ] = 0.0,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print each round's record as one line of JSON, and nothing else."
        ),
    ] = False,
) -> None:
    """Fine-tune one model on many clients' data; the result is one PEFT adapter.

    RECIPE.toml defines the run: model, task, data, clients, training.
    """
    set_threads(threads)
    quiet_libraries()
    check_is_there(recipe)
    from fedexlora.cli.terminal import JsonLines, Terminal, closing
    from fedexlora.rounds.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    # Every client's training ends in a full collection; it need not go through all libraries.
    gc.freeze()
    play = _player(engine, client_cpus, client_gpus)
    if as_json:
        play(loaded, out, resume=resume, keep_updates=keep_updates, observer=JsonLines())
        add_report(out)
        return
    with Terminal() as terminal:
        result = play(loaded, out, resume=resume, keep_updates=keep_updates, observer=terminal)
    closing(result, loaded, add_report(out))


def _player(engine: Engine, cpus: int, gpus: float) -> Callable[..., RunResult]:
    if engine is Engine.LOCAL:
        from fedexlora.rounds.run import run as local

        return local
    if find_spec("flwr") is None or find_spec("ray") is None:
        raise RecipeError(
            "--engine flower needs Flower's simulation", ["pip install 'fedexlora[simulation]'"]
        )
    from fedexlora.flower.simulation import Resources, simulate

    logging.getLogger("flwr").setLevel(logging.ERROR)
    return partial(simulate, resources=Resources(cpus, gpus))
