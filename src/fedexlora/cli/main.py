"""The ``fedexlora`` command: its subcommands, and how errors end it."""

from __future__ import annotations

import sys
from io import TextIOWrapper

import typer

from fedexlora import __version__
from fedexlora.cli.aggregate import aggregate
from fedexlora.cli.check import check
from fedexlora.cli.compare import compare
from fedexlora.cli.deviation import deviation
from fedexlora.cli.evaluate import evaluate
from fedexlora.cli.export import export
from fedexlora.cli.methods import methods
from fedexlora.cli.recipes import recipes
from fedexlora.cli.report import report
from fedexlora.cli.run import EPILOG, run
from fedexlora.cli.text import make_console, plain
from fedexlora.errors import FedexLoraError, InputError, of_training

app = typer.Typer(
    name="fedexlora",
    help="Federated LoRA fine-tuning whose aggregation is exact, and measured.",
    epilog="Start with: fedexlora recipes. What a command takes: fedexlora run --help.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(epilog=EPILOG)(run)
app.command()(check)
app.command()(compare)
app.command()(recipes)
app.command()(aggregate)
app.command()(deviation)
app.command()(evaluate)
app.command()(export)
app.command()(methods)
app.command()(report)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        typer.echo(f"fedexlora {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; exit 0 done, 1 a run failed, 2 the input was wrong."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names may hold what the terminal cannot write
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except FedexLoraError as error:
        _fail(f"{type(error).__name__}: {error}", error.exit_code)
    except ModuleNotFoundError as error:
        if not of_training(error):
            raise
        said = f"this needs the package {error.name}: pip install 'fedexlora[train]'"
        _fail(f"InputError: {said}", InputError.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; --resume continues from the last finished round", 1)


def _fail(message: str, code: int) -> None:
    make_console(stderr=True).print(f"[bold red]error[/] {plain(message)}", soft_wrap=True)
    sys.exit(code)
