"""docs/results.md holds what the committed records hold, and nothing else in its tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from benchmarks.results import deviation, e2e, glue
from benchmarks.results.cell import RECORDS, Cell, read_records
from benchmarks.results.document import DOCUMENTS, filled, tables

from fedexlora.rounds.recipe import load_recipe

ROOT = Path(__file__).parents[1]
TABLES = {"glue": glue, "deviation": deviation, "e2e": e2e}


def recipe_of(cell: Cell):
    settings = [text.format(data="data", work="work") for text in cell.settings]
    return load_recipe(ROOT / "recipes" / f"{cell.recipe}.toml", settings)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_holds_the_records(document):
    text = document.read_text(encoding="utf-8")
    assert filled(text, tables(RECORDS)) == text


def test_every_table_is_in_the_page_of_results():
    text = DOCUMENTS[0].read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: ([a-z0-9-]+) -->", text)) == set(tables(RECORDS))


@pytest.mark.parametrize("name", TABLES)
def test_the_records_are_those_of_the_cells(name):
    """A cell whose settings were changed has no record until it is run again."""
    sources = [cell.source for cell in TABLES[name].cells(smoke=False)]
    found = read_records(RECORDS / f"{name}.jsonl")
    assert [{key: x[key] for key in ("key", "recipe", "settings")} for x in found] == sources


@pytest.mark.parametrize("name", ["glue", "e2e"])
def test_every_exact_cell_was_exact(name):
    records = read_records(RECORDS / f"{name}.jsonl")
    assert all(x["error"] < 1e-5 for x in records if x["key"]["method"] != "FedIT")


@pytest.mark.parametrize("name", TABLES)
def test_the_cells_are_valid_recipes(name):
    cells = TABLES[name].cells(smoke=False)
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells[:8]:
        recipe_of(cell)
