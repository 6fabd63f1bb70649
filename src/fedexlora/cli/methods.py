"""``fedexlora methods``: every way to aggregate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from fedexlora.cli.tables import folding_table, print_entry
from fedexlora.cli.text import make_console

if TYPE_CHECKING:
    from fedexlora.methods import Method


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List every method: what it sends, what it keeps, whether it is exact, its paper."""
    from fedexlora.methods import METHODS

    if as_json:
        typer.echo(json.dumps([_described(method) for method in METHODS.values()]))
        return
    table = folding_table("method", "exact", "sends", "keeps", "paper")
    table.columns[-1].no_wrap = True
    for method in METHODS.values():
        paper = method.paper.replace(" ", "\n", 1)
        table.add_row(method.name, _exact(method), method.sends, method.keeps, paper)
    console = make_console()
    console.print(table)
    console.print("options, in \\[method] of a recipe", style="bold")
    for method in METHODS.values():
        if method.options.model_fields:
            print_entry(console, method.name, ", ".join(method.options.model_fields))
    console.print(
        "Exact [bold]as stated[/]: it adds to the mean update on purpose, or leaves out a stated "
        'part. Choose one in a recipe, [bold]name = "fedit"[/] in its table \\[method], or with '
        "[bold]--set method.name=fedit[/]; [bold]--json[/] says what every option means."
    )


def _exact(method: Method) -> Text:
    rule = method.default
    if rule.exact:
        return Text("yes", style="green")
    return Text("as stated", style="yellow") if rule.certified else Text("no", style="red")


def _described(method: Method) -> dict[str, object]:
    """A method as data; options have a default and a meaning."""
    rule = method.default
    said = {key: getattr(method, key) for key in ("name", "title", "paper", "sends", "keeps")}
    return {
        **said,
        "exact": rule.exact,
        "certified_against": method.certified_against,
        "trained": rule.factors,
        "mixed_ranks": rule.mixed_ranks,
        "late_updates": rule.late_updates,
        "one_global_model": not rule.personal,
        "one_place_for_all_rows": rule.pooled,
        "init_lora_weights": rule.start,
        "client_memory": rule.client.memory if rule.client else "none",
        "server_memory": rule.remembers,
        "options": {
            name: {"default": field.default, "meaning": " ".join((field.description or "").split())}
            for name, field in method.options.model_fields.items()
        },
    }
