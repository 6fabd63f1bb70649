"""``fedexlora methods``: every way to aggregate."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.text import Text

from fedexlora.cli.tables import folding_table
from fedexlora.cli.text import make_console


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List every method: what it sends, what it keeps, whether it is exact, its paper."""
    from fedexlora.methods import METHODS

    if as_json:
        keys = ("name", "title", "exact", "sends", "keeps", "trained", "paper")
        typer.echo(json.dumps([{k: getattr(m, k) for k in keys} for m in METHODS.values()]))
        return
    table = folding_table("method", "exact", "sends", "keeps of the remainder", "paper")
    table.columns[-1].no_wrap = True
    for method in METHODS.values():
        paper = method.paper.replace(" ", "\n", 1)
        exact = Text("yes", style="green") if method.exact else Text("no", style="red")
        table.add_row(method.name, exact, method.sends, method.keeps, paper)
    console = make_console()
    console.print(table)
    console.print(
        'Choose one in a recipe, [bold]method = "fedit"[/] in its table \\[federation], or with '
        "[bold]--set federation.method=fedit[/]."
    )
