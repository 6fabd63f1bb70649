"""``fedexlora methods``: every way to aggregate."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List every method: what it sends, what it keeps, whether it is exact, its paper."""
    from fedexlora.methods import METHODS

    if as_json:
        keys = ("name", "title", "exact", "sends", "keeps", "trained", "paper")
        typer.echo(json.dumps([{k: getattr(m, k) for k in keys} for m in METHODS.values()]))
        return
    table = Table(title="federation.method", title_justify="left")
    for column in ("method", "exact", "sends", "keeps of the remainder", "paper"):
        table.add_column(column)
    for method in METHODS.values():
        exact = "[green]yes[/]" if method.exact else "[red]no[/]"
        table.add_row(method.name, exact, method.sends, method.keeps, method.paper)
    Console().print(table)
