"""The command line in this process: its imports take far longer than a tiny run."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from fedexlora.cli import main


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def fedexlora(*arguments: object, columns: int = 120) -> Done:
    """What ``fedexlora ARGUMENTS`` prints, and the code that it exits with."""
    out, err = io.StringIO(), io.StringIO()
    words: Iterable[str] = ["fedexlora", *map(str, arguments)]
    code: object = 0
    with (
        patch("sys.argv", list(words)),
        patch.dict("os.environ", {"COLUMNS": str(columns)}),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return Done(code or 0, out.getvalue(), err.getvalue())
