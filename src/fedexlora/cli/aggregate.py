"""``fedexlora aggregate``: the exact weighted mean of adapters."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedexlora.cli.completion import METHODS
from fedexlora.cli.options import numbers, progress_over
from fedexlora.cli.results import print_aggregation, print_merged
from fedexlora.cli.text import make_console, plain
from fedexlora.errors import InputError


def aggregate(
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER_DIR..."),
    ],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the result.", metavar="DIR")],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="How much each adapter counts, e.g. its training rows; equal by default.",
            metavar="1,2,5",
        ),
    ] = None,
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
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="fedex is the exact mean; fedit and ffa average the factors, as those methods do.",
            autocompletion=lambda: list(METHODS),
        ),
    ] = "fedex",
    kind: Annotated[
        Literal["adapter", "merged"],
        typer.Option("--as", help="An adapter, or a full model with it merged in (needs --base)."),
    ] = "adapter",
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="The base model, a folder or a hub name: for --as merged, and where the adapters "
            "call one base by different names.",
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
    """Write the exact weighted mean of PEFT LoRA adapters.

    ADAPTER_DIR is a folder as PEFT saves an adapter; all are for one base model.
    """
    from fedexlora.adapters.aggregate import aggregate_adapters
    from fedexlora.adapters.output import check_new

    check_new(out)
    if kind == "merged" and base is None:
        raise InputError("--as merged: expected --base MODEL, the model that the adapters are for")
    given = numbers("--weights", weights)
    with tempfile.TemporaryDirectory(prefix="fedexlora-") as temporary:
        target = Path(temporary) / "adapter" if kind == "merged" else out
        with progress_over("aggregating") as progress:
            record = aggregate_adapters(
                adapters,
                target,
                weights=given,
                method=method,
                rank=rank,
                tolerance=tolerance,
                uniform_rank=uniform_rank,
                base=base,
                task=task,
                allow_missing=allow_missing,
                progress=progress,
            )
        if kind == "merged" and base is not None:
            print_merged(target, base, out, record, as_json=as_json)
            return
    if as_json:
        typer.echo(record.model_dump_json(ensure_ascii=True))
        return
    print_aggregation(record)
    make_console().print(f"adapter      [bold]{plain(out)}[/]", soft_wrap=True)
