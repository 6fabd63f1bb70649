"""JSON: one object a line, a list of objects, an object that holds such a list, or columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedexlora.data.columns import Columns
from fedexlora.errors import DataError


def add_json_lines(path: Path, text: str, columns: Columns) -> None:
    """Add the rows of a file with one object a line; lines without anything are passed over.

    Raises:
        DataError: naming the line that is no object.
    """
    if text.lstrip()[:1] == "[":
        add_json(path, text, columns)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: line {number}: expected a JSON object, found {error}"
            ) from error
        if not isinstance(row, dict):
            found = type(row).__name__
            raise DataError(f"{path}: line {number}: expected a JSON object, found {found}")
        columns.add_row(row)


def add_json(path: Path, text: str, columns: Columns) -> None:
    """Add the rows of a JSON document, or of one object a line.

    Raises:
        DataError: saying what is there instead of rows.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.strip():
            raise DataError(f"{path}: expected rows, found none") from None
        if getattr(error, "msg", "") == "Extra data" and text.lstrip()[:1] == "{":
            add_json_lines(path, text, columns)
            return
        raise DataError(f"{path}: expected JSON, found {error}") from error
    rows = _rows(path, document)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            found = type(row).__name__
            raise DataError(f"{path}: row {number}: expected a JSON object, found {found}")
        columns.add_row(row)


def _rows(path: Path, document: Any) -> list[Any]:  # noqa: ANN401 - whatever a file holds
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        found = type(document).__name__
        raise DataError(f"{path}: expected a list of objects, found {found}")
    tables = [key for key, value in document.items() if _is_table(value)]
    if len(tables) == 1:
        table: list[Any] = document[tables[0]]
        return table
    lengths = {len(x) if isinstance(x, list) else -1 for x in document.values()}
    if not tables and len(lengths) == 1 and lengths != {-1}:
        values = zip(*document.values(), strict=True)
        return [dict(zip(document, row, strict=True)) for row in values]
    if not any(isinstance(x, list | dict) for x in document.values()):
        return [document]  # the only line of a file with one object a line
    keys = ", ".join(map(repr, list(document)[:5])) + (", ..." if len(document) > 5 else "")
    what = f"{len(tables)} lists of objects" if tables else "none"
    raise DataError(
        f"{path}: expected a list of objects, or an object with one in it; "
        f"found an object of {keys} with {what}"
    )


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)
