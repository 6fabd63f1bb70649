"""``fedexlora report``: one HTML file of one run, several, or a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedexlora.cli.text import make_console, plain

REPORT = "report.html"
"""What ``fedexlora run`` writes into a run's folder."""


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR..."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="The page; replaced if it exists.", metavar="FILE.html"),
    ],
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures",
            help="Also write every figure into this folder, as SVG and as CSV.",
            metavar="DIR",
        ),
    ] = None,
) -> None:
    """Show runs as one HTML file that needs no network.

    DIR is the folder of a run, or of a comparison; several runs are compared.
    """
    from fedexlora.report.page import write_report

    write_report(folders, out, figures)
    console = make_console()
    console.print(f"report       [bold]{plain(out)}[/]", soft_wrap=True)
    if figures is not None:
        console.print(f"figures      [bold]{plain(figures)}[/]", soft_wrap=True)


def add_report(folder: Path) -> Path | None:
    """Write the report of a run that has just ended into its folder.

    Returns:
        The page; None if it cannot be drawn, which is said on standard error and nothing else: the
        run is finished, and its result is whole without a picture of it.
    """
    try:
        from fedexlora.report.page import write_report

        write_report([folder], folder / REPORT)
    except Exception as error:  # noqa: BLE001 - whatever it is, a finished run is not lost by it
        said = plain(f"no report: {type(error).__name__}: {error}")
        again = plain(f"fedexlora report {folder} --out FILE.html")
        make_console(stderr=True).print(f"[yellow]{said}[/]\n  later: {again}", soft_wrap=True)
        return None
    return folder / REPORT
