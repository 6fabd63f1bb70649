"""``fedexlora compare``: methods by settings by seeds, in one command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedexlora.cli.comparison_table import print_comparison
from fedexlora.cli.completion import override
from fedexlora.cli.options import progress_over
from fedexlora.cli.recipes import check_is_there
from fedexlora.cli.text import make_console
from fedexlora.errors import InputError
from fedexlora.exchange.comparison_records import CellRecord, ComparisonRecord, less_is_better
from fedexlora.local.notices import quiet_libraries

if TYPE_CHECKING:
    from fedexlora.rounds.comparison import Comparison

FILE = "compare.json"


def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml")],
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="The methods, with commas between them; `fedexlora methods` lists them.",
            metavar="NAME,NAME",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="A new folder: compare.json, and a run's folder for every method and seed.",
            metavar="DIR",
        ),
    ],
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds",
            help="The seeds, with commas between them; all methods of one seed have the same data "
            "order and initial adapter.",
            metavar="N,N",
        ),
    ] = "0,1,2",
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            help="Try every method with each of these values of a key; may be given several times.",
            metavar="table.key=VALUE,VALUE",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a value of the recipe for all runs, as of `fedexlora run`.",
            metavar="table.key=value",
            autocompletion=override,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help="The method, or the method and its settings as the table calls them, that "
            "differences are taken from; the first one if not given.",
            metavar="NAME",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="A score of the headline: what it takes to reach it is in the table.",
            metavar="METRIC=VALUE",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            help="Megabytes, up and down together: the score within them is in the table; those of "
            "the run that moves the fewest if not given.",
            min=0.0,
            metavar="MB",
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            help="Runs side by side, with one processor thread each; on GPUs, one for each.",
            min=1,
        ),
    ] = 1,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the comparison in --out, and fill its holes."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the content of compare.json, and nothing else.")
    ] = False,
) -> None:
    """Run methods side by side on one recipe, over seeds and settings, and compare them.

    Every run is an ordinary one, in DIR/runs. One that fails leaves a hole in the table, with its
    reason; the others go on, and --resume runs it again.
    """
    quiet_libraries()
    check_is_there(recipe)
    from fedexlora.methods import METHODS
    from fedexlora.rounds.comparison import Comparison
    from fedexlora.rounds.comparison_plan import parse_grid, plan

    names = _words("--methods", methods)
    cells = plan(recipe, names, _seeds(seeds), parse_grid(grid or ()), overrides or ())
    arms = list(dict.fromkeys(cell.arm.name for cell in cells))
    base = _baseline(baseline, arms)
    wanted = _target(target, cells[0].recipe.headline)
    comparison = Comparison(out, recipe, cells)
    comparison.check(resume=resume)
    titles = {name: METHODS[name].title for name in names}
    most = None if budget is None else round(budget * 1e6)

    def written(found: Sequence[CellRecord]) -> ComparisonRecord:
        return _write(comparison, found, titles, base, wanted, most)

    with progress_over("comparing") as progress:
        progress(0, len(cells))

        def ended(found: Sequence[CellRecord]) -> None:
            progress(sum(cell.hole is None for cell in found), len(cells))
            written(found)

        record = written(comparison.run(jobs, ended))
    if as_json:
        typer.echo(record.model_dump_json(ensure_ascii=True))
    else:
        print_comparison(make_console(), record, out / FILE)
    if any(cell.hole is not None for cell in record.cells):
        raise typer.Exit(1)


def _write(
    comparison: Comparison,
    cells: Sequence[CellRecord],
    titles: dict[str, str],
    baseline: str,
    target: float | None,
    budget: int | None,
) -> ComparisonRecord:
    """Make the record of all cells as they stand, and replace ``compare.json`` by it."""
    from fedexlora import __version__
    from fedexlora.exchange.files import replace_bytes, writing
    from fedexlora.report.arms import CONFIDENCE, Terms, arm_records, cheapest

    recipe = comparison.cells[0].recipe
    budget = cheapest(cells) if budget is None else budget
    arms = arm_records(cells, titles, Terms(recipe.headline, baseline, target, budget))
    names = dict.fromkeys(name for arm in arms for name in arm.scores)
    record = ComparisonRecord(
        fedexlora=__version__,
        recipe=str(comparison.recipe),
        command=shlex.join(["fedexlora", *sys.argv[1:]]),
        rounds=max(cell.recipe.federation.rounds for cell in comparison.cells),
        headline=recipe.headline,
        lower_is_better=tuple(name for name in names if less_is_better(name)),
        seeds=tuple(dict.fromkeys(cell.seed for cell in comparison.cells)),
        baseline=baseline,
        confidence=CONFIDENCE,
        target=target,
        budget=budget,
        same_start=tuple(comparison.same_start()),
        arms=tuple(arms),
        cells=tuple(cells),
    )
    path = comparison.path / FILE
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, record.model_dump_json(indent=2, ensure_ascii=True).encode())
    return record


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise InputError(f"{option}: expected at least one, with commas between them")
    return words


def _seeds(text: str) -> list[int]:
    words = _words("--seeds", text)
    if odd := [word for word in words if not word.isascii() or not word.isdigit()]:
        raise InputError("--seeds: expected whole numbers from 0", [f"found {x!r}" for x in odd])
    return [int(word) for word in words]


def _baseline(given: str | None, arms: Sequence[str]) -> str:
    """The arm of this name, or the first one of this method."""
    if given is None:
        return arms[0]
    found = [arm for arm in arms if given in (arm, arm.partition(" ")[0])]
    if not found:
        raise InputError(f"--baseline {given}: expected one of {', '.join(arms)}")
    return found[0]


def _target(given: str | None, headline: str) -> float | None:
    if given is None:
        return None
    name, _, value = given.rpartition("=")
    if name != headline:
        raise InputError(f"--target {given}: runs are compared by {headline}", [f"{headline}=0.5"])
    try:
        return float(value)
    except ValueError as error:
        raise InputError(f"--target {given}: {value!r} is not a number") from error
