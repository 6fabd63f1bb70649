"""Completion by the shell: what it offers is true, and it comes without PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys

from fedexlora.cli import completion
from fedexlora.methods import METHODS
from fedexlora.rounds.recipe import Recipe


def test_every_key_of_a_recipe_is_offered_and_no_other():
    keys = {
        f"{table}.{key}"
        for table, field in Recipe.model_fields.items()
        if table != "clients"
        for member in [field.annotation, *getattr(field.annotation, "__args__", ())]
        for key in getattr(member, "model_fields", {})
    }
    keys |= {f"method.{key}" for method in METHODS.values() for key in method.options.model_fields}
    assert set(completion.KEYS) == keys
    assert tuple(METHODS) == completion.METHODS


def test_the_start_of_a_word_is_completed():
    assert completion.override("federation.ro") == ["federation.robust=", "federation.rounds="]
    assert completion.override("lo") == ["lora."]
    assert completion.override("method.name=f") == [
        f"method.name={name}" for name in METHODS if name.startswith("f")
    ]
    assert completion.override("federation.rounds=") == []


def test_the_shells_program_asks_without_loading_pytorch():
    code = (
        "import sys, atexit; sys.argv[0] = 'fedexlora';"
        "atexit.register(lambda: print({'torch', 'transformers'} & set(sys.modules)));"
        "from fedexlora.cli import main; main()"
    )
    words = "fedexlora run recipe.toml --set federation.ro"
    asked = {"_FEDEXLORA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "4"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["federation.robust=", "federation.rounds=", "set()"]
