"""``fedexlora evaluate``: a finished run, an adapter or a plain model on a recipe's task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedexlora.cli.options import progress_bars
from fedexlora.cli.tables import print_blocks, print_entry
from fedexlora.cli.text import make_console, plain
from fedexlora.exchange.records import score_text
from fedexlora.local.notices import quiet_libraries
from fedexlora.rounds.observer import Observer

if TYPE_CHECKING:
    from fedexlora.exchange.adapter_records import EvaluationRecord


def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            help="The folder of a finished run or of an adapter; or a model: a folder, a hub name "
            "or package:NAME/PATH.",
            metavar="RUN_DIR|ADAPTER_DIR|MODEL",
        ),
    ],
    task: Annotated[
        Path | None,
        typer.Option(
            "--task",
            help="The recipe whose task and validation rows are used; a run's own if not given.",
            metavar="RECIPE.toml",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a value of the recipe.", metavar="table.key=value"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object only.")] = False,
) -> None:
    """Score a model on the validation rows of a recipe; nothing is trained or written.

    An adapter is put on the base that it names; --set model.source=MODEL names another one.
    """
    quiet_libraries()
    from fedexlora.adapters.evaluation import evaluate as evaluated

    with _Bar() as bar:
        record = evaluated(source, task, overrides or (), bar)
    if as_json:
        typer.echo(record.model_dump_json(ensure_ascii=True))
        return
    _print(record)


class _Bar(Observer):
    """Progress on standard error, gone at the end; notes stay."""

    def __init__(self) -> None:
        self._progress = progress_bars(make_console(stderr=True))
        self._work = self._progress.add_task("evaluating", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def preparing(self, what: str) -> None:
        """Show what is being prepared."""
        self._progress.update(self._work, description=what, total=None, completed=0)

    def note(self, what: str) -> None:
        """One line."""
        self._progress.console.print(f"[yellow]note[/] {plain(what)}", soft_wrap=True)

    def evaluating(self, done: int, batches: int) -> None:
        """Show how far scoring is."""
        self._progress.update(self._work, total=batches, completed=done)


def _print(record: EvaluationRecord) -> None:
    console = make_console()
    console.print(f"{record.kind:<12} [bold]{plain(record.source)}[/]", soft_wrap=True)
    if record.kind != "model":
        console.print(f"base         {plain(record.base)}", soft_wrap=True)
    names = list(dict.fromkeys([*record.metrics, *(record.recorded or {})]))
    found = {"score": record.metrics}
    if record.recorded is not None:
        found["in the run's\nlast round"] = record.recorded
    rows = [[name, *(score_text(scores, name) for scores in found.values())] for name in names]
    title = f"scores on {record.rows:,} validation rows"
    print_blocks(console, title, ["metric", *found], rows)
    for name, scorer in record.scorers.items():
        version = f", {scorer['version']}" if scorer["version"] else ""
        print_entry(console, plain(name), plain(scorer["implementation"] + version))
