"""One file and one row make a method: it is listed, runs, is held to what it says, and resumes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedexlora import methods
from fedexlora.cli.main import app
from fedexlora.errors import RecipeError
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.methods.made_up import MADE_UP
from tests.rounds.conftest import data_folder, document, files  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def _row(monkeypatch):
    monkeypatch.setitem(methods._TABLE, MADE_UP.name, MADE_UP)


def test_it_is_listed_with_its_options():
    found = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)[-1]
    assert (found["name"], found["exact"], found["server_memory"]) == ("made_up", True, True)
    assert found["options"]["shrink"]["default"] == 0.5


def test_a_recipe_may_name_it_and_its_options_and_no_others(document):  # noqa: F811
    document["method"] = {"name": "made_up", "shrink": 0.25}
    assert parse_recipe(document, "test").method.options == {"shrink": 0.25}
    document["method"] = {"name": "made_up", "shrnk": 0.25}
    with pytest.raises(RecipeError, match=r"made_up has no such option; did you mean 'shrink'\?"):
        parse_recipe(document, "test")


def test_it_runs_exactly_and_goes_on_where_it_was(document, tmp_path):  # noqa: F811
    document["method"] = {"name": "made_up"}
    whole = run(parse_recipe(document, "test"), tmp_path / "whole")
    assert all(record.certificate.held for record in whole.records)
    assert whole.records[-1].certificate.bound < 1e-6
    for rounds in (1, 2, 3):
        document["federation"]["rounds"] = rounds
        part = run(parse_recipe(document, "test"), tmp_path / "parts", resume=True)
    assert files(part.adapter) == files(whole.adapter)
