"""The cells of a comparison: methods by settings by seeds, each an ordinary recipe and run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from fedexlora.errors import RecipeError
from fedexlora.methods import METHODS
from fedexlora.rounds.recipe import Recipe, load_recipe

METHOD_KEY, SEED_KEY = "method.name", "federation.seed"


@dataclass(frozen=True, slots=True)
class Arm:
    """A method with one choice of the grid's settings."""

    method: str
    settings: Mapping[str, str]
    """Values by key, as they were written."""

    @property
    def name(self) -> str:
        """What it is called.

        >>> Arm("fedex", {"lora.r": "4"}).name
        'fedex lora.r=4'
        """
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.settings.items())])


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm with one seed."""

    arm: Arm
    seed: int
    recipe: Recipe
    overrides: tuple[str, ...]
    """What makes it of the recipe that was named."""

    @property
    def run(self) -> str:
        """The folder of its run below the comparison's."""
        return f"runs/{folder_name(self.arm)}/seed-{self.seed}"


def folder_name(arm: Arm) -> str:
    """An arm's name as that of a folder, whatever its values hold.

    >>> folder_name(Arm("fedex", {"task.metrics": '["f1"]'}))
    'fedex,task.metrics=%5B%22f1%22%5D'
    """
    plain = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-=+,")
    text = ",".join([arm.method, *(f"{key}={value}" for key, value in arm.settings.items())])
    return "".join(c if c in plain else "".join(f"%{b:02X}" for b in c.encode()) for c in text)


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """``table.key=value,value`` to values by key, which are checked with the recipes of the cells.

    Raises:
        RecipeError: naming every text that is none.
    """
    grid: dict[str, list[str]] = {}
    faults: list[str] = []
    for text in texts:
        key, equals, values = text.partition("=")
        found = _values(values)
        if not equals or not found:
            faults.append(f"--grid {text}: expected table.key=VALUE,VALUE")
        elif key in grid:
            faults.append(f"--grid {text}: {key} is there twice")
        elif key in (METHOD_KEY, SEED_KEY):
            option = "--methods" if key == METHOD_KEY else "--seeds"
            faults.append(f"--grid {text}: give it by {option}")
        grid[key] = found
    if faults:
        raise RecipeError("the grid cannot be compared", faults)
    return grid


def method_faults(methods: Sequence[str]) -> list[str]:
    """What is wrong with a list of methods; one line each."""
    faults = []
    for name in methods:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, 1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(METHODS)}"
            )
            faults.append(f"--methods: there is no {name!r}; {hint}")
    twice = sorted({name for name in methods if methods.count(name) > 1})
    return faults + [f"--methods: {name} is there twice" for name in twice]


def plan(
    path: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    grid: Mapping[str, Sequence[str]],
    overrides: Sequence[str] = (),
) -> list[Cell]:
    """The cells, arm by arm, seed by seed.

    Args:
        path: of the recipe.
        methods: names.
        seeds: at least one, each once.
        grid: values by key.
        overrides: ``table.key=value`` of all cells.

    Raises:
        RecipeError: with the faults of all cells whose recipe cannot be.
    """
    faults = method_faults(methods)
    faults += [f"--seeds: {s} is there twice" for s in sorted({*seeds}) if seeds.count(s) > 1]
    faults += [f"--seeds: expected at least 0, found {seed}" for seed in seeds if seed < 0]
    if faults:
        raise RecipeError("the comparison cannot be made", faults)
    cells: list[Cell] = []
    impossible: dict[str, list[str]] = {}
    for method, values in product(methods, product(*grid.values())):
        arm = Arm(method, dict(zip(grid, values, strict=True)))
        for seed in seeds:
            said = [f"{key}={value}" for key, value in arm.settings.items()]
            own = (*overrides, f"{METHOD_KEY}={method}", f"{SEED_KEY}={seed}", *said)
            try:
                cells.append(Cell(arm, seed, load_recipe(path, own), own))
            except RecipeError as error:
                for fault in error.faults or (error.summary,):
                    impossible.setdefault(fault, []).append(arm.name)
    if impossible:
        raise RecipeError(
            "these cells of the comparison cannot be run",
            [f"{', '.join(dict.fromkeys(arms))}: {fault}" for fault, arms in impossible.items()],
        )
    return cells


def _values(text: str) -> list[str]:
    """Values with commas between them, those inside brackets and quotes left alone."""
    found, depth, quote, start = [], 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and not depth:
            found.append(text[start:place])
            start = place + 1
    found.append(text[start:])
    return [value.strip() for value in found if value.strip()]
