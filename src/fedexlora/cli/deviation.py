"""``fedexlora deviation``: what averaging the factors of adapters would lose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedexlora.cli.options import numbers, progress_over
from fedexlora.cli.results import print_remarks

if TYPE_CHECKING:
    from fedexlora.exchange.adapter_records import DeviationModuleRecord, DeviationRecord

_BAR = 24


def deviation(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT adapters.", metavar="ADAPTER_DIR")],
    weights: Annotated[
        str | None, typer.Option("--weights", help="One for each adapter.", metavar="1,2,5")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Also draw layers by projections.", metavar="FILE.png|svg|pdf"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base model, if the adapters name it differently."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", help="PEFT's task type, where adapters name it differently.", metavar="NAME"
        ),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Take a missing module for a zero update.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how far averaging adapters' factors is from averaging their updates."""
    from fedexlora.adapters.deviation import deviation as find_deviation

    if plot:
        from fedexlora.report.heatmap import check_format, draw_deviation

        check_format(plot)
    given = numbers("--weights", weights)
    with progress_over("comparing") as progress:
        record = find_deviation(
            adapters,
            given,
            base=base,
            task=task,
            allow_missing=allow_missing,
            progress=progress,
        )
    if plot:
        draw_deviation(record, plot)
    if as_json:
        typer.echo(record.model_dump_json())
        return
    console = Console(highlight=False)
    console.print(_modules(record))
    console.print(_grouped(record, "projection", lambda m: m.projection))
    for source in record.sources:
        if source.names or source.zero or source.same_as:
            console.print(f"             {escape(source.adapter)}", soft_wrap=True)
            print_remarks(console, source)
    shares = ", ".join(f"{source.weight:.3g}" for source in record.sources)
    console.print(
        f"averaging the factors of these {len(record.sources)} adapters (shares {shares}) loses "
        f"[bold]{record.deviation:.2%}[/] of their mean update",
        soft_wrap=True,
    )
    if plot:
        console.print(f"heat map     [bold]{escape(str(plot))}[/]", soft_wrap=True)


def _modules(record: DeviationRecord) -> Table:
    table = _table("module")
    top = max(m.deviation for m in record.modules)
    for module in record.modules:
        _row(table, module.module, module.deviation, module.ideal, top)
    return table


def _grouped(
    record: DeviationRecord, title: str, key: Callable[[DeviationModuleRecord], str]
) -> Table:
    """All modules of one kind together: the norm of their residuals over that of their updates."""
    groups: dict[str, list[DeviationModuleRecord]] = {}
    for module in record.modules:
        groups.setdefault(key(module), []).append(module)
    rows = {
        name: (_norm(m.residual for m in group), _norm(m.ideal for m in group))
        for name, group in groups.items()
    }
    table = _table(title)
    top = max(residual / (ideal or 1.0) for residual, ideal in rows.values())
    for name, (residual, ideal) in rows.items():
        _row(table, name, residual / (ideal or 1.0), ideal, top)
    return table


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column(first, overflow="fold")
    table.add_column("averaging loses", justify="right")
    table.add_column("")
    table.add_column("norm of the mean update", justify="right")
    return table


def _row(table: Table, name: str, value: float, ideal: float, top: float) -> None:
    eighths = round(8 * _BAR * value / top) if top else 0
    bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    table.add_row(escape(name), f"{value:.2%}", f"[cyan]{bar}[/]", f"{ideal:.3g}")


def _norm(values: Iterable[float]) -> float:
    return sqrt(sum(value**2 for value in values))
