"""Clients in Ray's processes: ``fedexlora run --engine flower``, and ``flwr run``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedexlora.methods import METHODS
from fedexlora.rounds.recipe import load_recipe, parse_recipe
from fedexlora.rounds.run import run
from tests.flower.deployment import make_app, make_data
from tests.flower.superlink import flwr_run
from tests.rounds.conftest import files, recipe_document, records_without_times

pytest.importorskip("ray")


@pytest.mark.slow
def test_the_simulation_ends_with_the_model_of_one_process_to_the_bit(
    bert, data_folder, whole, tmp_path
):
    """Resumed after its first round, too."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(parse_recipe(recipe_document(bert, data_folder), "test").to_toml())
    out = tmp_path / "out"
    command = [Path(sys.executable).with_name("fedexlora"), "run", recipe, "--out", out]
    command += ["--engine", "flower", "--client-cpus", "1", "--resume"]
    own = {"FLWR_HOME": str(tmp_path / "flower"), "FLWR_TELEMETRY_ENABLED": "0"}
    own |= {"RAY_USAGE_STATS_ENABLED": "0"}
    for rounds in (1, 3):
        done = subprocess.run(
            [*command, "--set", f"federation.rounds={rounds}"],
            env=os.environ | own,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert files(out / "adapter") == files(whole / "adapter")
    # Simulated nodes keep nothing and take the total, so that the bytes differ.
    scores = [
        [(r["metrics"], r["modules"], r["certificate"]) for r in records_without_times(folder)]
        for folder in (out, whole)
    ]
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rolora", "fedsa", "fedavgm", "flora", "lora_a2"])
def test_methods_end_in_the_simulation_as_in_one_process(bert, data_folder, tmp_path, method):
    """Alternating halves, memory of clients and of the server; two of three clients, resumed."""
    document = recipe_document(bert, data_folder)
    document["method"] = {"name": method}
    document["federation"] |= {"clients_per_round": 2, "rounds": 4}
    if METHODS[method].default.personal:
        document["evaluation"] = {"where": "clients", "holdout": 0.3}
        document["task"]["labels"] = ["x", "y"]
    local = run(parse_recipe(document, "test"), tmp_path / "local")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(parse_recipe(document, "test").to_toml())
    command = [Path(sys.executable).with_name("fedexlora"), "run", recipe, "--engine", "flower"]
    command += ["--out", tmp_path / "out", "--client-cpus", "1", "--resume"]
    own = {"FLWR_HOME": str(tmp_path / "flower"), "FLWR_TELEMETRY_ENABLED": "0"}
    own |= {"RAY_USAGE_STATS_ENABLED": "0"}
    for rounds in (2, 4):
        done = subprocess.run(
            [*command, "--set", f"federation.rounds={rounds}"],
            env=os.environ | own,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    folder = "adapters" if METHODS[method].default.personal else "adapter"
    assert files(tmp_path / "out" / folder) == files(local.folder / folder)
    scores = [
        [(r["metrics"], r["modules"], r["certificate"]) for r in records_without_times(x)]
        for x in (tmp_path / "out", local.folder)
    ]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_the_deployments_app_runs_in_flowers_simulation_with_the_same_recipe(tmp_path):
    """Nodes that have no configuration are the clients of the recipe's partition."""
    make_data(tmp_path)
    make_app(tmp_path, {"rounds = 3": "rounds = 2"})
    out = tmp_path / "out"
    log = flwr_run(
        tmp_path / "app",
        tmp_path / "flower",
        *("--run-config", f'out="{out}" authenticated=false'),
        *("--federation-config", "num-supernodes=3 client-resources-num-cpus=1"),
    )
    assert (out / "adapter").exists(), log
    local = run(load_recipe(tmp_path / "app" / "recipe.toml"), tmp_path / "local")
    assert files(out / "adapter") == files(local.adapter)
