"""``fedexlora run``: a recipe, from data to adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedexlora.cli.options import quiet_libraries


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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each round's record as one line of JSON.")
    ] = False,
) -> None:
    """Fine-tune one model on many clients' data; the result is one PEFT adapter."""
    quiet_libraries()
    from fedexlora.cli.terminal import JsonLines, Terminal, closing
    from fedexlora.engine.recipe import load_recipe
    from fedexlora.engine.run import run as run_recipe

    loaded = load_recipe(recipe, overrides or ())
    if as_json:
        run_recipe(loaded, out, resume=resume, keep_updates=keep_updates, observer=JsonLines())
        return
    with Terminal() as terminal:
        result = run_recipe(
            loaded, out, resume=resume, keep_updates=keep_updates, observer=terminal
        )
    closing(result, loaded)
