"""The tables of documents: each stands between two marks, and comes from the records alone."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.results import deviation, e2e, glue
from benchmarks.results.cell import ROOT, read_records

DOCUMENTS = (ROOT / "docs" / "results.md", ROOT / "docs" / "paper.md")
_MARKED = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(records: Path) -> dict[str, str]:
    """Every table by name, from a folder of records."""
    return {
        **glue.tables(read_records(records / "glue.jsonl")),
        **deviation.tables(read_records(records / "deviation.jsonl")),
        **e2e.tables(read_records(records / "e2e.jsonl")),
    }


def filled(text: str, tables: dict[str, str]) -> str:
    """A document with its tables made again.

    Raises:
        KeyError: if the document has a table that is not made here.
    """
    return _MARKED.sub(lambda mark: f"{mark[1]}\n{tables[mark[2]]}\n\n{mark[3]}", text)


def write_tables(records: Path) -> None:
    """Make the tables of all documents again."""
    made = tables(records)
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        document.write_text(filled(text, made), encoding="utf-8")
