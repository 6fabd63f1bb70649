"""``fedexlora aggregate``: the exact weighted mean of adapters."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from fedexlora.cli.options import numbers, progress_over
from fedexlora.cli.results import print_aggregation, print_merged
from fedexlora.cli.text import plain
from fedexlora.errors import InputError


def aggregate(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT adapters.", metavar="ADAPTER_DIR")],
    out: Annotated[Path, typer.Option("--out", help="The new folder.", metavar="DIR")],
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="One for each adapter; equal by default.", metavar="1,2,5"),
    ] = None,
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
    method: Annotated[
        str, typer.Option("--method", help="fedex is exact; fedit averages the factors.")
    ] = "fedex",
    kind: Annotated[
        Literal["adapter", "merged"],
        typer.Option("--as", help="An adapter, or a full model with it merged in."),
    ] = "adapter",
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="The base model: needed for --as merged, and where adapters name it differently.",
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
        bool, typer.Option("--allow-missing", help="Take a missing module for a zero update.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the exact weighted mean of PEFT LoRA adapters."""
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
    Console(highlight=False).print(f"adapter      [bold]{plain(out)}[/]", soft_wrap=True)
