"""The files of examples/deploy: well-formed, and with options that Flower has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedexlora.flower.node import load_node, recipe_for_nodes
from fedexlora.flower.permission import local_recipe
from fedexlora.rounds.recipe import load_recipe

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"


@pytest.mark.parametrize("program", ["flower-superlink", "flower-supernode"])
def test_every_option_is_one_of_flowers(program):
    command = str(Path(sys.executable).with_name(program))
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"--[a-z-]+", done.stdout))
    used: dict[str, set[str]] = {}
    for path in (DEPLOY / "federation.sh", *DEPLOY.glob("*.service")):
        text = path.read_text().replace("\\\n", " ")
        lines = [line for line in text.splitlines() if re.search(rf"\b{program} -", line)]
        used[path.name] = {word for line in lines for word in re.findall(r" (--[a-z-]+)", line)}
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    words = services[program.removeprefix("flower-")]["command"]
    assert words[0] == program
    used["compose.yml"] = {word.partition("=")[0] for word in words[1:]}
    assert sum(map(bool, used.values())) == 3, used
    for name, options in used.items():
        assert options <= known, name


def test_the_example_node_takes_the_example_recipe(tmp_path):
    text = (DEPLOY / "node.toml").read_text()
    for mark in ("DEPLOY", "NODE", "SHARE", "HERE"):
        text = text.replace(f"@{mark}@", "1")
    (tmp_path / "node.toml").write_text(text)
    recipe = load_recipe(DEPLOY / "app" / "recipe.toml")
    task = recipe.task.model_dump(mode="json", exclude_none=True)
    node = load_node(tmp_path / "node.toml")
    assert local_recipe(recipe_for_nodes(recipe, task), node).lora == recipe.lora


def test_the_script_says_what_it_does():
    done = subprocess.run(
        [str(DEPLOY / "federation.sh")],
        capture_output=True,
        text=True,
        check=False,
        env={"DEPLOY": "/tmp", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2
    assert "federation.sh keys" in done.stdout
    assert "federation.sh stop" in done.stdout
