"""``fedexlora export``: a finished run as one adapter or one full model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedexlora.cli.options import progress_over
from fedexlora.cli.text import make_console, plain
from fedexlora.exchange.records import score_text
from fedexlora.local.notices import quiet_libraries

if TYPE_CHECKING:
    from fedexlora.exchange.adapter_records import ExportRecord


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the result.", metavar="DIR")],
    kind: Annotated[
        Literal["adapter", "merged"],
        typer.Option("--as", help="A PEFT adapter, or a full model with it merged in."),
    ] = "adapter",
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            help="No layer has a higher rank; the best approximation, with its error stated. "
            "Without it nothing is left out.",
            metavar="R",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Instead of --rank: the share of its update that a layer may lose, 0 to 1.",
            metavar="EPS",
        ),
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
        typer.Option(
            "--base",
            help="For --as merged: a folder or hub name of the base, if not the recipe's.",
            metavar="MODEL",
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Load what was written, as a user would, and score it on the validation rows.",
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            help="Also upload it to the Hugging Face hub, with your token (hf auth login).",
            metavar="OWNER/NAME",
        ),
    ] = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="With --push: make a new repository public; private if not given."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object only.")] = False,
) -> None:
    """Write the global model of a finished run, with a model card.

    RUN_DIR is the folder that the run was given as --out.
    """
    quiet_libraries()
    from fedexlora.adapters.export import ExportOptions, export_run

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
    console = make_console()
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
    for name in record.metrics:
        again = ""
        if record.exported_metrics is not None:
            again = f"  as exported {score_text(record.exported_metrics, name)}"
        console.print(f"{plain(name):<12} {score_text(record.metrics, name)}{again}")
    console.print(f"{kind:<12} [bold]{plain(out)}[/]", soft_wrap=True)
    if record.pushed_to:
        console.print(f"uploaded to  [bold]{plain(record.pushed_to)}[/]", soft_wrap=True)
