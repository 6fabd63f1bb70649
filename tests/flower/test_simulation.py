"""``fedexlora run --engine flower``: clients in Ray's processes, the model of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedexlora.engine.recipe import parse_recipe
from tests.engine.conftest import files, recipe_document, records_without_times

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
    assert records_without_times(out) == records_without_times(whole)
