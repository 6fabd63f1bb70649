"""Every recipe of the repository is valid, and so is what its header says to change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedexlora.rounds.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
"""Those below ``base`` are none by themselves."""
PAPER = {"cola", "mrpc", "qnli", "rte", "sst2", "stsb", "e2e", "commonsense"}
PAPER |= {"metamath-mistral-7b", "metamath-gemma-2-9b"}


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def test_all_recipes_are_seen():
    assert {path.stem for path in RECIPES} == PAPER | {"chat", "quickstart"}


def test_a_base_is_extended_by_recipes():
    bases = {f'extends = "base/{path.name}"' for path in (ROOT / "recipes" / "base").glob("*")}
    said = {line for path in RECIPES for line in path.read_text().splitlines()}
    assert bases <= said


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_survives_being_written_out(path, tmp_path):
    recipe = load_recipe(path)
    copy = tmp_path / "resolved.toml"
    copy.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_header_says_to_set_is_valid(path):
    found = re.findall(r"--set ('[^']+'|\S+)", header(path))
    for change in (x.strip("'").rstrip(";,.") for x in found):
        load_recipe(path, [change, "training.use_cpu=true"])  # bf16 may be on without a GPU


@pytest.mark.parametrize(
    "path", [x for x in RECIPES if x.stem != "quickstart"], ids=lambda x: x.stem
)
def test_a_header_has_the_command_local_copies_numbers_and_cost(path):
    said = header(path)
    assert f"fedexlora run recipes/{path.stem}.toml --out runs/{path.stem}\n" in said
    for key in ("data", "model", *(f"evaluation.sets.{x}.data" for x in own_sources(path))):
        assert f"--set {key}.source=FOLDER" in said
    for begin in ("# The paper", "Ours: ", "# Reckoned, not measured: "):
        assert begin in said


def own_sources(path: Path) -> list[str]:
    """The sets of a recipe that lie elsewhere than its rows."""
    sets = load_recipe(path).evaluation.sets
    return [name for name, table in sets.items() if "source" in table.data]
