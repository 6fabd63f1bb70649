"""Clients that the recipe allows or excludes, by name."""

from __future__ import annotations

import json

import pytest

from fedexlora.errors import RecipeError
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run


def test_a_resumed_run_may_shut_a_client_out_and_let_it_in_again(document, tmp_path):
    """Others keep their rows, and the excluded one is no client: neither drawn nor left out."""

    def play(rounds, **changes):
        document["federation"] |= {"rounds": rounds, **changes}
        return run(parse_recipe(document, "test"), tmp_path / "run", resume=True).records[-1]

    whole = {c.client: c.num_examples for c in play(1).clients}
    assert set(whole) == {"site-north", "site-south", "site-west"}
    for rounds, changes in (
        (2, {"exclude": ["site-south"]}),
        (3, {"exclude": [], "allow": ["site-north", "site-west"]}),
    ):
        record = play(rounds, **changes)
        found = {c.client: c.num_examples for c in record.clients}
        assert found == {name: whole[name] for name in ("site-north", "site-west")}
        assert (record.registered, record.left_out) == (2, ())
        assert record.certificate.held
    document["federation"].pop("allow")
    assert {c.client for c in play(4).clients} == set(whole)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["clients"] == whole


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (
            {"exclude": ["site-east"]},
            "federation.exclude: there is no client 'site-east'; expected",
        ),
        (
            {"allow": ["north"]},
            "federation.allow: there is no client 'north'; expected some of site",
        ),
        (
            {"exclude": ["site-north", "site-south", "site-west"]},
            "federation.exclude: it names all of site-north, site-south, site-west",
        ),
    ],
)
def test_clients_that_there_are_not_cannot_be_admitted_or_shut_out(
    document, tmp_path, table, fault
):
    document["federation"] |= table
    with pytest.raises(RecipeError) as caught:
        run(parse_recipe(document, "test"), tmp_path / "run")
    assert fault in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (
            {"allow": ["a", "b"], "exclude": ["b"]},
            "federation.exclude: b cannot be in federation.allow",
        ),
        ({"allow": []}, "federation.allow: "),
        ({"exclude": ["../x"]}, "federation.exclude: string should match"),
        ({"exclude": "site-north"}, "federation.exclude: "),
    ],
)
def test_lists_of_clients_that_cannot_be_are_refused(document, table, fault):
    document["federation"] |= table
    with pytest.raises(RecipeError) as caught:
        parse_recipe(document, "test")
    assert fault in str(caught.value)
