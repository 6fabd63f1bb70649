"""``fedexlora check``: what a recipe will take, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from fedexlora.cli.completion import override
from fedexlora.cli.recipes import check_is_there
from fedexlora.cli.tables import folding_table, print_entry
from fedexlora.cli.text import make_console, plain
from fedexlora.exchange.forecast_records import ForecastRecord, MemoryRecord, ModuleKindRecord
from fedexlora.local.notices import quiet_libraries
from fedexlora.local.threads import set_threads
from fedexlora.texts import printable, size


def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a value of the recipe, as of `fedexlora run`; may be given several times.",
            metavar="table.key=value",
            autocompletion=override,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a run would take, and what is wrong with its recipe; train and write nothing.

    Where the model's weights are on this machine, they are loaded and one step is tried, as a run
    does before its first round; else its configuration is enough.
    """
    set_threads(None)
    quiet_libraries()
    check_is_there(recipe)
    from fedexlora.cli.terminal import Terminal
    from fedexlora.rounds.forecast import forecast
    from fedexlora.rounds.observer import Observer
    from fedexlora.rounds.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if as_json:
        typer.echo(forecast(loaded, str(recipe), Observer()).model_dump_json(ensure_ascii=True))
        return
    with Terminal() as terminal:
        found = forecast(loaded, str(recipe), terminal)
    _print(make_console(), found)


def _print(console: Console, found: ForecastRecord) -> None:
    most = "" if found.exact else "about "
    rows = found.clients.values()
    share = found.trained_parameters / found.all_parameters
    console.print(f"[bold]{plain(found.title)}[/], {found.rounds} rounds: {plain(found.recipe)}")
    entries = [
        ("checked", _checked(found)),
        (
            "clients",
            (
                f"{len(found.clients)} with {min(rows):,} to {max(rows):,} training rows, "
                f"{found.clients_per_round} a round; {found.validation_rows:,} validation rows"
            ),
        ),
        (
            "trained",
            (
                f"{found.trained_parameters:,} of {found.all_parameters:,} parameters, "
                f"{share:.2%}, in {sum(kind.count for kind in found.modules)} adapted modules"
            ),
        ),
        (
            "arithmetic",
            (
                f"frozen weights in {found.precision}; training multiplies in {found.training}, "
                f"scoring in {found.scoring}, on {found.device}"
            ),
        ),
    ]
    for label, text in entries:
        print_entry(console, label, text)
    console.print(_modules(found))
    for reason, kinds in _reasons(found).items():
        print_entry(console, kinds[0].placement, f"{', '.join(_names(kinds))}: {plain(reason)}")
    entries = [
        ("up", f"{size(found.up)} a client and round"),
        ("down", f"{most}{_down(found)}"),
        ("newcomers", f"{most}{_newcomers(found)}"),
        ("whole run", f"{size(sum(found.round_up))} up, {most}{size(sum(found.round_down))} down"),
        *((f"{memory.where}", _memory(memory)) for memory in found.memory),
        ("disk", f"about {size(found.disk)} in the run's folder"),
    ]
    if found.truncation:
        entries.append(("truncated", found.truncation))
    for label, text in entries:
        print_entry(console, label, text)


def _checked(found: ForecastRecord) -> str:
    if found.rehearsed:
        return (
            "[green]no fault[/]; the model is loaded, and one step on the longest rows was undone"
        )
    return f"[green]no fault[/], but [yellow]not rehearsed[/]: {plain(found.why_not)}"


def _modules(found: ForecastRecord) -> object:
    table = folding_table("modules")
    for name in ("", "shape", "rank", "a round's\nremainder", "after the\nlast round", "dense"):
        table.add_column(name, justify="right", overflow="fold")
    for kind in found.modules:
        table.add_row(
            Text(printable(kind.kind)),
            f"{kind.count}×",
            f"{kind.d_out}×{kind.d_in}",
            str(kind.rank),
            _rank(kind.piece_rank),
            _rank(kind.total_rank),
            _dense(kind),
        )
    return table


def _rank(rank: int | None) -> str:
    return "dense" if rank is None else f"rank {rank}" if rank else "none"


def _dense(kind: ModuleKindRecord) -> str:
    if kind.dense_after is None:
        return f"from rank {kind.break_even}" if kind.piece_rank else "never"
    return f"after round {kind.dense_after}"


def _reasons(found: ForecastRecord) -> dict[str, list[ModuleKindRecord]]:
    groups: dict[str, list[ModuleKindRecord]] = {}
    for kind in found.modules:
        groups.setdefault(kind.reason, []).append(kind)
    return groups


def _names(kinds: list[ModuleKindRecord]) -> list[str]:
    return [plain(name) for name in dict.fromkeys(kind.kind for kind in kinds)]


def _down(found: ForecastRecord) -> str:
    first = f"{size(found.down_first)} in its first round"
    return f"{size(found.down)} a round and client, {first}" if found.down else first


def _newcomers(found: ForecastRecord) -> str:
    return ", ".join(f"{size(x.bytes)} in round {x.round}" for x in found.newcomers)


def _memory(memory: MemoryRecord) -> str:
    parts = ", ".join(f"{name} {size(count)}" for name, count in memory.parts.items() if count)
    return f"[bold]{size(memory.total)}[/] of memory: {parts}"
