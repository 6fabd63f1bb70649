"""Recipes: every fault is named at once, with the key as the user wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedexlora.errors import RecipeError
from fedexlora.exchange.seeds import derive_seed
from fedexlora.rounds.recipe import load_recipe, parse_recipe


def faults(document: dict) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(document, "test")
    return caught.value.faults


def test_unknown_keys_are_named_with_the_nearest_valid_one(document):
    document["federation"]["round"] = 3
    document["task"]["labell"] = "x"
    document["partition"]["colum"] = "x"
    document["lora"]["alpha"] = 1
    document["training"]["learn_rate"] = 1
    document["extra"] = {}
    found = faults(document)
    assert "federation.round: unknown key; did you mean 'rounds'?" in found
    assert "task.labell: unknown key; did you mean 'label'?" in found
    assert "partition.colum: unknown key; did you mean 'column'?" in found
    assert any(f.startswith("extra: unknown key; known here: model, task") for f in found)
    assert any(f.startswith("training.learn_rate:") and "'learning_rate'" in f for f in found)
    assert any(f.startswith("lora.alpha: LoraConfig has no such field") for f in found)
    assert len(found) == 6


def test_values_are_checked_and_shown(document):
    document["federation"] |= {"rounds": 0}
    document["method"]["name"] = "fedx"
    document["partition"] = {"kind": "dirichlet", "clients": 2, "alpha": -1.0}
    document["task"]["metrics"] = ["accuracy", "bleu"]
    document["training"]["output_dir"] = "x"
    del document["model"]
    found = faults(document)
    assert "model: missing" in found
    assert "federation.rounds: input should be greater than or equal to 1; found 0" in found
    assert "method.name: 'fedx' is no method; did you mean 'fedex'?" in found
    assert "partition.alpha: input should be greater than 0; found -1.0" in found
    assert "training.output_dir: not set here; it is --out" in found
    assert any(f.startswith("task.metrics") and f.endswith('found "bleu"') for f in found)
    assert len(found) == 6


def test_an_unknown_kind_lists_the_known_ones(document):
    document["partition"] = {"kind": "random"}
    (fault,) = faults(document)
    assert fault.startswith("partition: ")
    assert all(f"'{kind}'" in fault for kind in ("iid", "dirichlet", "by_column"))


def test_training_values_are_checked_before_anything_starts(document):
    document["training"]["lr_scheduler_type"] = "zigzag"
    (fault,) = faults(document)
    assert "zigzag" in fault


def test_overrides_are_toml_or_else_text(document, tmp_path):
    import tomlkit

    path = tmp_path / "recipe.toml"
    path.write_text(tomlkit.dumps(document))
    recipe = load_recipe(
        path,
        [
            "federation.rounds=7",
            "method.name=ffa",
            'lora.target_modules=["key"]',
            "evaluation.batch_size=5",
            "training.learning_rate=1e-4",
        ],
    )
    assert (recipe.federation.rounds, recipe.method.name) == (7, "ffa")
    assert recipe.lora["target_modules"] == ["key"]
    assert recipe.evaluation.batch_size == 5
    assert recipe.training["learning_rate"] == 1e-4
    for bad in ("rounds=7", "federation.rounds", "model.source.x=1"):
        with pytest.raises(RecipeError, match="--set"):
            load_recipe(path, [bad])


def test_another_method_takes_the_place_of_the_options_of_the_one_before(document, tmp_path):
    import tomlkit

    document["method"] = {"name": "fedex", "next_adapter": "svd"}
    path = tmp_path / "recipe.toml"
    path.write_text(tomlkit.dumps(document))
    assert load_recipe(path, ["method.name=fedex"]).method.options["next_adapter"] == "svd"
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(load_recipe(path).to_toml())
    for source in (path, resolved):
        found = load_recipe(source, ["method.momentum=0.5", "method.name=fedavgm"]).method
        assert found.name == "fedavgm"
        assert found.options == {"momentum": 0.5, "rate": 1.0, "momentum_rank": None}
        assert load_recipe(source, ["method.name=fedit"]).method.options == {}
    (tmp_path / "more.toml").write_text('extends = "recipe.toml"\n[method]\nname = "ffa"\n')
    assert load_recipe(tmp_path / "more.toml").method.options == {}


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.toml: cannot be read: No such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(RecipeError, match=r"bad\.toml: not valid TOML: .*line 1"):
        load_recipe(tmp_path / "bad.toml")


def test_seeds_depend_on_seed_round_and_client_alone():
    assert derive_seed(1, 2, "a") == derive_seed(1, 2, "a")
    seeds = {derive_seed(s, r, c) for s in (0, 1) for r in (1, 2, 11) for c in ("a", "1a", "b")}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**31 for seed in seeds)


def write_recipe(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_takes_what_it_does_not_say_from_the_one_it_extends(tmp_path):
    write_recipe(
        tmp_path,
        "base.toml",
        """
        [model]
        source = "some/model"
        [task]
        kind = "classification"
        text = "text"
        [data]
        source = "some/data"
        config = "one"
        [partition]
        kind = "dirichlet"
        clients = 3
        alpha = 0.5
        [lora]
        r = 4
        target_modules = ["query"]
        """,
    )
    write_recipe(tmp_path, "middle.toml", 'extends = "base.toml"\n[data]\nconfig = "two"')
    path = write_recipe(
        tmp_path,
        "recipe.toml",
        """
        extends = "middle.toml"
        [lora]
        r = 1
        [partition]
        kind = "iid"
        clients = 7
        """,
    )
    recipe = load_recipe(path, ["lora.lora_alpha=9"])
    assert (recipe.data.source, recipe.data.config) == ("some/data", "two")
    assert recipe.lora == {"r": 1, "target_modules": ["query"], "lora_alpha": 9}
    assert recipe.partition.kind == "iid"  # nothing is left of the other kind's keys
    assert recipe.partition.clients == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "recipe.toml"', "it extends itself: recipe.toml -> recipe.toml"),
        ('extends = "missing.toml"', "missing.toml, which .*recipe.toml extends: cannot be read"),
        ("extends = 3", "extends: expected a file, found 3"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(tmp_path, "recipe.toml", text))


def test_a_start_that_a_method_has_not_is_refused_with_the_way_out(document):
    changed = document | {"method": {"name": "frlora"}}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(changed, "test")
    said = "lora.init_lora_weights: frlora starts from 'pissa', found True"
    assert caught.value.faults == (said,)
    changed["lora"] = document["lora"] | {"init_lora_weights": "pissa"}
    assert parse_recipe(changed, "test").rule.start == ("pissa",)
