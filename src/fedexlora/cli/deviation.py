"""``fedexlora deviation``: what averaging the factors loses, of adapters or of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedexlora.cli.options import numbers, progress_over
from fedexlora.cli.results import print_remarks
from fedexlora.cli.run_deviation import is_run, show_runs
from fedexlora.cli.tables import folding_table, width
from fedexlora.cli.text import make_console, plain
from fedexlora.texts import printable

if TYPE_CHECKING:
    from fedexlora.exchange.adapter_records import DeviationModuleRecord, DeviationRecord

_BARS = (24, 16, 8)
"""Lengths of the longest bar, of which the first that fits is taken; none on a narrow terminal."""


def deviation(
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER_DIR...|RUN_DIR..."),
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="How much each adapter counts, e.g. its training rows; equal by default.",
            metavar="1,2,5",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="Also draw a heat map, layers by projections; of runs, the whole analysis.",
            metavar="FILE.png|svg|pdf",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="The base model's name, where the adapters call one base by different names.",
            metavar="MODEL",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", help="PEFT's task type, where adapters name it differently.", metavar="NAME"
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="Take a layer that an adapter lacks for a zero update, instead of refusing it.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object only.")] = False,
) -> None:
    """Show how far averaging adapters' factors is from averaging their updates.

    ADAPTER_DIR is a folder as PEFT saves an adapter; all are for one base model. RUN_DIR is a run's
    folder: what it recorded is shown round by round, and nothing is computed again.
    """
    if any(map(is_run, adapters)):
        others = {"--weights": weights, "--base": base, "--task": task}
        given = [name for name, value in others.items() if value is not None]
        given += ["--allow-missing"] if allow_missing else []
        show_runs(adapters, plot, as_json=as_json, options=given)
        return
    from fedexlora.adapters.deviation import deviation as find_deviation

    if plot:
        from fedexlora.report.chart import check_format
        from fedexlora.report.heatmap import draw_deviation

        check_format(plot)
    shares = numbers("--weights", weights)
    with progress_over("comparing") as progress:
        record = find_deviation(
            adapters,
            shares,
            base=base,
            task=task,
            allow_missing=allow_missing,
            progress=progress,
        )
    if plot:
        draw_deviation(record, plot)
    if as_json:
        typer.echo(record.model_dump_json(ensure_ascii=True))
        return
    console = make_console()
    console.print(_fitting(console, "module", _modules(record)))
    console.print(_fitting(console, "projection", _grouped(record, lambda m: m.projection)))
    for source in record.sources:
        if source.names or source.zero or source.same_as:
            console.print(f"             {plain(source.adapter)}", soft_wrap=True)
            print_remarks(console, source)
    weighed = ", ".join(f"{source.weight:.3g}" for source in record.sources)
    console.print(
        f"averaging the factors of these {len(record.sources)} adapters (shares {weighed}) loses "
        f"[bold]{record.deviation:.2%}[/] of their mean update",
        soft_wrap=True,
    )
    if plot:
        console.print(f"heat map     [bold]{plain(plot)}[/]", soft_wrap=True)


def _modules(record: DeviationRecord) -> list[tuple[str, float, float]]:
    return [(module.module, module.deviation, module.ideal) for module in record.modules]


def _grouped(
    record: DeviationRecord, key: Callable[[DeviationModuleRecord], str]
) -> list[tuple[str, float, float]]:
    """All modules of one kind together: the norm of their residuals over that of their updates."""
    groups: dict[str, list[DeviationModuleRecord]] = {}
    for module in record.modules:
        groups.setdefault(key(module), []).append(module)
    found = []
    for name, group in groups.items():
        residual, ideal = _norm(m.residual for m in group), _norm(m.ideal for m in group)
        found.append((name, residual / (ideal or 1.0), ideal))
    return found


def _fitting(console: Console, first: str, rows: list[tuple[str, float, float]]) -> Table:
    """Names, deviations and norms; with bars if there is room for them, and a way to print them."""
    for length in () if console.options.ascii_only else _BARS:
        table = _table(first, rows, length)
        if width(console, table) <= console.width:
            return table
    return _table(first, rows, 0)


def _table(first: str, rows: list[tuple[str, float, float]], bar: int) -> Table:
    table = folding_table(first)
    table.add_column("averaging\nloses", justify="right", overflow="fold")
    if bar:
        table.add_column("", overflow="fold")
    table.add_column("norm of the\nmean update", justify="right", overflow="fold")
    top = max(deviation for _, deviation, _ in rows)
    for name, value, ideal in rows:
        eighths = round(8 * bar * value / top) if top else 0
        drawn = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        bars = [Text(drawn, style="cyan")] if bar else []
        table.add_row(Text(printable(name)), f"{value:.2%}", *bars, f"{ideal:.3g}")
    return table


def _norm(values: Iterable[float]) -> float:
    return sqrt(sum(value**2 for value in values))
