"""``fedexlora recipes``: the recipes that come with the package."""

from __future__ import annotations

import tomllib
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import tomlkit
import typer
from rich.text import Text

from fedexlora.cli.tables import folding_table
from fedexlora.cli.text import make_console, plain
from fedexlora.errors import InputError, RecipeError
from fedexlora.rounds.recipe_file import read_document


def packaged_recipes() -> dict[str, Path]:
    """The files by name: inside the installed package, or beside ``src`` in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    folder = installed if installed.is_dir() else package.parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def check_is_there(recipe: Path) -> None:
    """Say at once, and with the way out, what is no file."""
    if recipe.is_dir() and (recipe / "recipe.toml").is_file():
        raise RecipeError(
            f"recipe {recipe}: this is a run's folder", [f"its recipe is {recipe / 'recipe.toml'}"]
        )
    if not recipe.exists():
        ways = ["`fedexlora recipes` lists those that come with the package"]
        if recipe.stem in packaged_recipes():
            ways = [f"`fedexlora recipes --write {recipe.stem}` writes {recipe.stem}.toml here"]
        raise RecipeError(f"recipe {recipe}: cannot be read: No such file or directory", ways)


def recipes(
    write: Annotated[
        str | None,
        typer.Option(
            "--write",
            help="Write this recipe to NAME.toml, here, to be changed and run.",
            metavar="NAME",
            autocompletion=lambda: list(packaged_recipes()),
        ),
    ] = None,
) -> None:
    """List the recipes that come with the package, or write one to a file."""
    known = packaged_recipes()
    console = make_console()
    if write is None:
        table = folding_table("recipe", "what it is")
        for name, path in known.items():
            table.add_row(name, Text(_title(path)))
        console.print(table)
        console.print("Write one to a file: [bold]fedexlora recipes --write cola[/]")
        return
    if write not in known:
        raise InputError(f"--write {write}: expected one of {', '.join(known)}")
    target = Path(f"{write}.toml")
    if target.exists():
        raise InputError(f"--write {write}: {target} exists already")
    target.write_text(_whole(known[write]), encoding="utf-8")
    console.print(f"recipe       [bold]{plain(target)}[/]")
    console.print(f"run it       fedexlora run {target} --out runs/{write}", soft_wrap=True)


def _whole(path: Path) -> str:
    """A recipe by itself: with the values of the one that it extends, and the comments of both."""
    document = read_document(path)
    extended = tomllib.loads(path.read_text(encoding="utf-8")).get("extends")
    if extended is None:
        return path.read_text(encoding="utf-8")
    comments = [*_comment(path), "#", *_comment(path.parent / extended)]
    return "\n".join([*comments, "", tomlkit.dumps(document)])


def _comment(path: Path) -> list[str]:
    """The lines that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(takewhile(lambda line: line.startswith("#"), lines))


def _title(path: Path) -> str:
    """The first sentence of a recipe's opening comment."""
    words = " ".join(line.removeprefix("#").strip() for line in _comment(path))
    ends = [words.find(end) for end in (". ", "? ") if end in words]
    return words[: min(ends) + 1] if ends else words
