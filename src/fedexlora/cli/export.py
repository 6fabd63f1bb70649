"""``fedexlora export``: a finished run as one adapter or one full model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from fedexlora.cli.options import progress_over
from fedexlora.cli.text import plain
from fedexlora.engine.quiet import quiet_libraries

if TYPE_CHECKING:
    from fedexlora.exchange.adapter_records import ExportRecord


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.", metavar="RUN_DIR")],
    out: Annotated[Path, typer.Option("--out", help="The new folder.", metavar="DIR")],
    kind: Annotated[
        Literal["adapter", "merged"],
        typer.Option("--as", help="A PEFT adapter, or a full model with it merged in."),
    ] = "adapter",
    rank: Annotated[
        int | None, typer.Option("--rank", help="The largest rank of a module.", metavar="R")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="The largest error of a module, 0 to 1.", metavar="EPS"),
    ] = None,
    uniform_rank: Annotated[
        bool,
        typer.Option(
            "--uniform-rank",
            help="Pad all modules to one rank, for servers such as llama.cpp that need it.",
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", help="For --as merged: other files of the base.", metavar="MODEL"),
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Score what is exported on the validation rows.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option("--push", help="Also upload it to the hub.", metavar="OWNER/NAME"),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: a new repository is public.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the global model of a finished run, with a model card."""
    quiet_libraries()
    from fedexlora.engine.export import ExportOptions, export_run

    options = ExportOptions(
        kind=kind,
        rank=rank,
        tolerance=tolerance,
        uniform_rank=uniform_rank,
        base=base,
        evaluate=evaluate,
        push_to=push,
        private=not public,
    )
    with progress_over("exporting") as progress:
        record = export_run(run, out, options, progress=progress)
    if as_json:
        typer.echo(record.model_dump_json(ensure_ascii=True))
        return
    _print(record, out, kind)


def _print(record: ExportRecord, out: Path, kind: str) -> None:
    console = Console(highlight=False)
    console.print(f"run          {plain(record.run)}, {record.rounds} rounds", soft_wrap=True)
    lost = f"[yellow]{record.error:.2%}[/] of the update" if record.error else "[green]nothing[/]"
    console.print(f"left out     {lost}; rank {record.rank}")
    console.print(
        f"measured     worst module {plain(record.worst_module)}, off by {record.worst_error:.1e} "
        f"of the last version's update",
        soft_wrap=True,
    )
    if kind == "merged":
        console.print(f"rounding     {record.rounding:.1e} of the update is lost in the weights")
    for name, value in record.metrics.items():
        again = ""
        if record.exported_metrics is not None:
            again = f"  as exported {record.exported_metrics[name]:.4f}"
        console.print(f"{plain(name):<12} {value:.4f}{again}")
    console.print(f"{kind:<12} [bold]{plain(out)}[/]", soft_wrap=True)
    if record.pushed_to:
        console.print(f"uploaded to  [bold]{plain(record.pushed_to)}[/]", soft_wrap=True)
