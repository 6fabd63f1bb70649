"""The references: all rows in one place, and every client alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fedexlora.errors import RecipeError
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import client_rows, prepare_client
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.rounds.test_run import recipe

WEIGHTS = "adapter_model.safetensors"


def test_centralised_training_has_the_rows_of_all_admitted_clients(document, tmp_path):
    chosen = {"exclude": ["site-south"], "clients_per_round": 1, "min_updates": 1}
    plain = recipe(document, exclude=["site-south"])
    parsed = recipe(document, method={"name": "centralised"}, rounds=1, **chosen)
    rows = sum(client_rows(plain).values())
    assert client_rows(parsed) == {"centralised": rows}
    (record,) = run(parsed, tmp_path / "run").records
    assert [(x.client, x.num_examples, x.weight) for x in record.clients] == [
        ("centralised", rows, 1.0)
    ]
    assert record.certificate.held
    assert record.deviation == 0.0
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    assert header["clients"] == {"centralised": rows}


def test_a_node_has_not_the_rows_of_all(document):
    parsed = recipe(document, method={"name": "centralised"})
    with pytest.raises(RecipeError, match="in one place") as caught:
        prepare_client(parsed, "site-south", "site-south", Observer())
    assert "fedexlora run" in caught.value.faults[0]


def test_a_client_that_trains_alone_ends_where_a_run_of_it_alone_does(document, tmp_path):
    run(recipe(document, method={"name": "local_only"}), tmp_path / "all")
    clients = sorted(path.name for path in (tmp_path / "all" / "adapters").iterdir())
    assert clients == ["site-north", "site-south", "site-west"]
    for client in clients[:2]:
        run(recipe(document, allow=[client]), tmp_path / client)
        alone = load_file(tmp_path / client / "adapter" / WEIGHTS)
        found = load_file(tmp_path / "all" / "adapters" / client / WEIGHTS)
        assert found.keys() == alone.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, alone[name])


def test_updates_that_nobody_sends_cannot_be_kept(document, tmp_path):
    parsed = recipe(document, method={"name": "local_only"})
    with pytest.raises(RecipeError, match="local_only send no adapters"):
        run(parsed, tmp_path / "run", keep_updates=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["centralised", "local_only"])
def test_where_nothing_is_aggregated_nothing_can_be_robust(document, name):
    changed = document | {"method": {"name": name}}
    changed["federation"] = document["federation"] | {"robust": "clip"}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(changed, "test")
    fault = f"federation.robust: {name} has no updates to compare; leave it out"
    assert caught.value.faults == (fault,)
