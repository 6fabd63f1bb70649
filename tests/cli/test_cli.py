"""The commands as a user types them: output, exit codes, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomlkit
import torch
from typer.main import get_command

from fedexlora.cli.main import app
from fedexlora.local.threads import set_threads
from fedexlora.methods import METHODS
from fedexlora.rounds.recipe import load_recipe
from tests.cli.invoke import fedexlora
from tests.rounds.conftest import data_folder, document  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe_file(document, tmp_path):  # noqa: F811
    path = tmp_path / "recipe.toml"
    path.write_text(tomlkit.dumps(document))
    return path


def test_methods_lists_every_method_and_its_paper():
    table = fedexlora("methods")
    assert table.returncode == 0
    found = json.loads(fedexlora("methods", "--json").stdout)
    assert [row["name"] for row in found] == list(METHODS)
    for row in found:
        assert row["name"] in table.stdout
        assert row["paper"].split()[0] in table.stdout
        assert all(option["meaning"] for option in row["options"].values())
        assert row["options"].keys() <= set(table.stdout.replace(",", " ").split())
    assert [row["exact"] for row in found] == [method.default.exact for method in METHODS.values()]


def test_a_run_ends_with_a_table_and_commands_that_work(recipe_file, tmp_path):
    out = tmp_path / "run"
    done = fedexlora("run", recipe_file, "--out", out, "--keep-updates", "--set", "lora.r=3")
    assert done.returncode == 0, done.stderr
    assert "exact" in done.stdout
    assert "averaging" in done.stdout
    assert str(out / "adapter") in done.stdout.replace("\n", "")
    assert str(out / "report.html") in done.stdout.replace("\n", "")
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    commands = re.findall(r"^    ((?:fedexlora|python) .*)$", done.stdout, re.M)
    assert len(commands) == 3
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "fedexlora":
            again = fedexlora(*arguments)
        else:
            again = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False
            )
        assert again.returncode == 0, (command, again.stderr)


def test_json_prints_one_record_a_round_and_nothing_else(recipe_file, tmp_path):
    done = fedexlora("run", recipe_file, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["round"] for line in done.stdout.splitlines()] == [1, 2, 3]
    assert done.stdout == (tmp_path / "run" / "rounds.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "federation.roundz=3"], "federation.roundz: unknown key; did you mean 'rounds'"),
        (["--set", "lora.target_modules=['q_proj']"], "no module of this model is named 'q_proj'"),
        (["--set", "task.label=topic"], "topic"),
        (["--set", "partition.column=where"], "where"),
        (["--set", "model.source=./none"], "there is no folder none"),
    ],
)
def test_wrong_input_exits_2_names_the_key_and_writes_nothing(
    recipe_file, tmp_path, arguments, message
):
    done = fedexlora("run", recipe_file, "--out", tmp_path / "run", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_exits_1_and_says_why(recipe_file, tmp_path):
    done = fedexlora(
        "run", recipe_file, "--out", tmp_path / "run", "--set", "training.learning_rate=1e38"
    )
    assert done.returncode == 1
    assert re.search("NoUpdatesError: round 1: no client delivered a usable update", done.stderr)
    assert (tmp_path / "run" / "versions" / "snapshot-0000.safetensors").exists()


def test_help_and_version():
    assert fedexlora("--version").stdout.startswith("fedexlora 0.")
    shown = fedexlora("run", "--help").stdout
    for option in ("--out", "--set", "--resume", "--keep-updates", "--json"):
        assert option in shown


def test_the_installed_program_exits_with_the_code_that_is_documented(tmp_path):
    command = [sys.executable, "-c", "from fedexlora.cli import main; main()"]
    missing = [*command, "run", "none.toml", "--out", "run"]
    done = subprocess.run(missing, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "none.toml: cannot be read: No such file" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        (
            ["model.dtype=bfloat16", "federation.placement=fold"],
            "not exact: bfloat16 weights round away what is folded into them",
        ),
        (["method.remainder_rank=1"], "truncated, as asked: rounds left out up to"),
        (["model.dtype=bfloat16", "training.schedule=run"], "exact: in every round"),
    ],
)
def test_the_verdict_says_what_the_model_is(recipe_file, tmp_path, changes, verdict):
    words = [word for change in changes for word in ("--set", change)]
    done = fedexlora("run", recipe_file, "--out", tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert verdict in done.stdout
    assert "trained and scored on cpu" in done.stdout
    # With one schedule over the run, more rounds would be refused.
    assert ("two more rounds:" in done.stdout) == ("training.schedule=run" not in changes)


def test_recipes_are_listed_and_written_to_be_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = fedexlora("recipes").stdout
    stored = {path.stem: path for path in (ROOT / "recipes").glob("*.toml")}
    assert all(name in shown for name in stored)
    for name, path in stored.items():
        done = fedexlora("recipes", "--write", name)
        assert f"fedexlora run {name}.toml" in done.stdout
        # By itself, also where it extends another one here.
        assert load_recipe(tmp_path / f"{name}.toml") == load_recipe(path)
        assert "extends" not in (tmp_path / f"{name}.toml").read_text().splitlines()
    again = fedexlora("recipes", "--write", "cola")
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    other = fedexlora("recipes", "--write", "../cola")
    assert (other.returncode, "expected one of chat, cola" in other.stderr) == (2, True)


def test_a_recipe_that_is_not_there_is_refused_with_the_way_out(tmp_path):
    folder = tmp_path / "of a run"
    folder.mkdir()
    (folder / "recipe.toml").touch()
    for recipe, message in [
        ("cola", "`fedexlora recipes --write cola` writes cola.toml here"),
        ("mine.toml", "`fedexlora recipes` lists those that come with the package"),
        (folder, f"its recipe is {folder / 'recipe.toml'}"),
    ]:
        done = fedexlora("run", recipe, "--out", tmp_path / "run")
        assert done.returncode == 2
        assert message in done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command", ["run", "check", "compare", "aggregate", "deviation", "export", "methods"]
)
def test_every_option_has_a_help(command):
    options = get_command(app).commands[command].params
    assert options
    for option in options:
        assert option.param_type_name == "argument" or len(option.help) > 15, option.name


def test_help_says_where_recipes_come_from():
    shown = fedexlora("run", "--help").stdout
    for said in ("fedexlora recipes --write", "docs/recipes.md", "recipes/", "fedexlora run cola"):
        assert said in shown


def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(monkeypatch):
    for given, count, expected in [
        ({}, None, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({}, 3, {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}),
        (
            {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "ACTIVE"},
            None,
            {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "ACTIVE"},
        ),
        ({"GOMP_SPINCOUNT": "100"}, None, {"GOMP_SPINCOUNT": "100"}),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr("os.environ", dict(given))
            set_threads(count)
            assert os.environ == expected


def test_the_threads_are_shown_and_recorded(recipe_file, tmp_path):
    done = fedexlora("run", recipe_file, "--out", tmp_path / "run", "--set", "federation.rounds=1")
    machine = json.loads((tmp_path / "run" / "run.json").read_text())["machine"]
    assert machine["torch_threads"] == torch.get_num_threads()
    assert machine["thread_waiting"]
    (waiting,) = (f"{name}={value}" for name, value in machine["thread_waiting"].items())
    assert f"{machine['torch_threads']} ({waiting})" in done.stdout
