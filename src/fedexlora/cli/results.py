"""What aggregating and merging print, for all commands that do it."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console

from fedexlora.cli.options import progress_over
from fedexlora.cli.text import make_console, plain
from fedexlora.exchange.adapter_records import AggregationRecord, SourceRecord
from fedexlora.local.notices import quiet_libraries
from fedexlora.texts import size


def print_merged(
    adapter: Path, base: str, out: Path, record: AggregationRecord, *, as_json: bool
) -> None:
    """Merge and say what the dtype of the base rounds away."""
    quiet_libraries()
    from fedexlora.adapters.merge import merge_adapter

    with progress_over("merging") as progress:
        merged = merge_adapter(adapter, base, out, progress=progress)
    if as_json:
        both = {"aggregation": record.model_dump(), "merge": merged.model_dump()}
        typer.echo(json.dumps(both))
        return
    print_aggregation(record)
    console = make_console()
    console.print(
        f"rounding     [yellow]{merged.error:.1e}[/] of the update is lost in {merged.dtype} "
        f"weights; worst {merged.worst_error:.1e} in {plain(merged.worst_module)}",
        soft_wrap=True,
    )
    console.print(f"model        [bold]{plain(out)}[/]", soft_wrap=True)


def print_aggregation(record: AggregationRecord) -> None:
    """What went in, what came out, and what was left out."""
    console = make_console()
    for source in record.sources:
        console.print(f"{source.weight:7.4f}      {plain(source.adapter)}", soft_wrap=True)
        if source.missing:
            console.print(
                f"             [yellow]zero updates[/] for {len(source.missing)} modules that it "
                f"lacks: {plain(', '.join(source.missing))}",
                soft_wrap=True,
            )
        print_remarks(console, source)
    ranks = sorted({module.rank for module in record.modules})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    console.print(
        f"result       {len(record.modules)} modules of rank {span}, {size(record.bytes)}"
        + (f"; {len(record.dense)} heads and biases averaged" if record.dense else "")
    )
    if record.matched_with:
        console.print(f"checked      PEFT loads every tensor onto {plain(record.matched_with)}")
    if record.tokenizer:
        console.print("tokenizer    that of the adapters, beside the result")
    worst = max(record.modules, key=lambda module: module.error)
    if record.lossless:
        console.print("error        [green]none[/]: the weighted mean update, but for rounding")
        return
    console.print(
        f"error        [yellow]{record.error:.2%}[/] of the mean update over all modules; worst "
        f"{worst.error:.2%} in {plain(worst.module)}",
        soft_wrap=True,
    )


def print_remarks(console: Console, source: SourceRecord) -> None:
    """What a reader should know of one adapter that went in."""
    said = [f"names: {note}" for note in source.names]
    if source.zero:
        said.append("every update is zero, as of an adapter that was never trained; it is counted")
    if source.same_as is not None:
        said.append(f"the same numbers as {source.same_as}, which so counts twice")
    for line in said:
        console.print(f"             [yellow]{plain(line)}[/]", soft_wrap=True)
