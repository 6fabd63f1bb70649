"""``fedexlora deviation RUN_DIR``: the deviation that runs recorded, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from fedexlora.cli.tables import print_blocks
from fedexlora.cli.text import make_console, plain
from fedexlora.errors import InputError

if TYPE_CHECKING:
    from fedexlora.report.deviation_record import DeviationAnalysisRecord, RunDeviationRecord


def is_run(folder: Path) -> bool:
    """Whether a folder is one of a run, or of a comparison."""
    return any((folder / name).is_file() for name in ("recipe.toml", "compare.json"))


def show_runs(
    folders: Sequence[Path], plot: Path | None, *, as_json: bool, options: Sequence[str]
) -> None:
    """Print what runs recorded, and draw it.

    Args:
        folders: of runs, or the one of a comparison.
        plot: the picture; none is drawn if not given.
        as_json: print one JSON object only.
        options: those that were given and are of adapters only.

    Raises:
        InputError: if adapters or their options are among them, or records cannot be read.
    """
    from fedexlora.report.chart import check_format
    from fedexlora.report.deviation_charts import draw_analysis
    from fedexlora.report.deviation_record import deviation_analysis
    from fedexlora.report.run_set import read_runs

    faults = [f"{folder}: no run's folder" for folder in folders if not is_run(folder)]
    faults += [f"{name}: of adapters only; a run's weights are in its records" for name in options]
    if faults:
        raise InputError("either adapters or runs, not both", faults)
    if plot:
        check_format(plot)
    runs = read_runs(folders)
    if plot:
        draw_analysis(runs, plot)
    record = deviation_analysis(runs)
    if as_json:
        typer.echo(record.model_dump_json(ensure_ascii=True))
        return
    console = make_console()
    for run in record.runs:
        _print_run(console, run)
    _print_epochs(console, record)
    if plot:
        console.print(f"picture      [bold]{plain(plot)}[/]", soft_wrap=True)


def _print_run(console: Console, run: RunDeviationRecord) -> None:
    if not run.rounds:
        console.print(f"{plain(run.run)}: no finished round", soft_wrap=True)
        return
    names = list(run.rounds[0].projections)
    header = ["round", "averaging\nloses", "norm of\nwhat is lost", *names]
    header += ["remainder /\nweights", "mean rank of\nremainder", "bf16 fold\nloses"]
    rows = [
        [
            str(x.round),
            f"{x.deviation:.2%}",
            _text(x.residual, ".3g"),
            *(_text(x.projections[name], ".2%") for name in names),
            _text(x.remainder, ".2%"),
            _text(x.rank, ".4g"),
            _text(x.bf16_loss, ".2%"),
        ]
        for x in run.rounds
    ]
    print_blocks(console, f"{run.run}: what averaging the factors would lose", header, rows)


def _print_epochs(console: Console, record: DeviationAnalysisRecord) -> None:
    if record.by_epochs:
        rows = [
            [x.method, f"{x.local_epochs:g}", f"{x.deviation:.2%}", str(x.runs)]
            for x in record.by_epochs
        ]
        header = ["method", "local epochs", "averaging loses", "runs"]
        print_blocks(console, "round 1, by local epochs", header, rows)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
