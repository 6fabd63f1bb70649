"""Each recipe trains, writes, scores and resumes on a small model of its class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedexlora.cli.recipes import packaged_recipes
from fedexlora.data.text_metrics.table import TEXT_METRICS, metric_faults
from fedexlora.exchange.forecast_records import ForecastRecord
from fedexlora.exchange.records import RoundRecord
from fedexlora.rounds.forecast import forecast
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.recipe import Recipe, load_recipe
from fedexlora.rounds.run import run
from tests.recipes.row_files import COMMONSENSE, made_files, real_files, sources, write_files
from tests.recipes.small_models import MODELS, small_model
from tests.rounds.test_run import StopAt, same_run

RECIPES = packaged_recipes()
SMALLER = [
    "data.max_train_rows=26",
    "data.max_validation_rows=6",
    "federation.rounds=2",
    "evaluation.every=2",
    "training.num_train_epochs=1",
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=1",
    "training.warmup_steps=0",
    "training.use_cpu=true",
]
NEW_TOKENS = 3
NEED_JAVA = {name for name, metric in TEXT_METRICS.items() if "java" in metric.requirements}


def smaller(name: str, folder: Path, model: Path, *, java: bool = False) -> Recipe:
    """A recipe on local rows and a local model, at a reduced size.

    Metrics that need Java, whose start takes seconds, are left out unless asked for.
    """
    changes = [*SMALLER, *sources(name, folder), f"model.source={model}"]
    if name == "quickstart":
        changes += ["partition.min_rows=1", "partition.clients=3"]
    whole = load_recipe(RECIPES[name])
    for set_, table in whole.evaluation.sets.items():
        changes.append(f"evaluation.sets.{set_}.data.max_validation_rows=3")
        if "max_new_tokens" in table.task["generation"]:
            changes.append(f"evaluation.sets.{set_}.task.generation.max_new_tokens={NEW_TOKENS}")
    if generation := getattr(whole.task, "generation", None):
        kept = [x for x in generation.metrics if java or x not in NEED_JAVA]
        changes.append(f"task.generation.metrics={kept}")
        changes.append(f"task.generation.max_new_tokens={NEW_TOKENS}")
    return load_recipe(RECIPES[name], changes)


def scores(recipe: Recipe) -> set[str]:
    """The names of all scores that a recipe asks for."""
    names = set(recipe.task.metrics)
    if generation := getattr(recipe.task, "generation", None):
        names |= {*generation.metrics, "generation/unfinished"}
    if getattr(recipe.task, "choices", None):
        names.add("choice_accuracy")
    for name in recipe.evaluation.sets:
        names |= {f"{name}.{score}" for score in scores(recipe.of_set(name))}
    return names


def trains_scores_and_resumes(recipe: Recipe, folder: Path) -> None:
    whole, stopped = folder / "whole", folder / "stopped"
    result = run(recipe, whole)
    assert len(result.records) == 2
    for record in result.records:
        assert record.certificate.held
        assert len(record.clients) == getattr(recipe.partition, "clients", None)
    assert result.records[0].metrics == {}
    assert scores(recipe) <= result.records[1].metrics.keys()
    assert recipe.headline in result.records[1].metrics
    assert (result.adapter / "adapter_model.safetensors").exists()
    with pytest.raises(KeyboardInterrupt):
        run(recipe, stopped, observer=StopAt(1, "end"))
    run(recipe, stopped, resume=True)
    same_run(whole, stopped)


def is_what_was_checked(found: ForecastRecord, folder: Path) -> None:
    """A run without faults moves the bytes that were reckoned, to within a few digits."""
    assert found.rehearsed, found.why_not
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    records = [RoundRecord.model_validate_json(line) for line in lines]
    for record, up, down in zip(records, found.round_up, found.round_down, strict=True):
        assert up == pytest.approx(record.bytes.up, rel=0.05)
        assert down == pytest.approx(record.bytes.down, rel=0.05)
    header = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (found.clients, found.precision) == (header["clients"], header["precision"])
    most = {
        (kind.kind, kind.placement, kind.d_out * kind.d_in): kind.total_rank
        for kind in found.modules
    }
    for module in records[-1].modules:
        name = module.module.rpartition(".")[2]
        ranks = [rank for key, rank in most.items() if key[:2] == (name, module.placement)]
        assert ranks, module.module
        # Where the sum is compacted, it may come to a lower rank than factors in general have.
        if None not in ranks:
            assert module.remainder in {f"rank {rank}" if rank else "none" for rank in ranks}


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """The folder of a recipe's small model, made once for each kind."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        kind = MODELS[name]
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            small_model(kind, folders[kind])
        return folders[kind]

    return folder_of


def test_no_recipe_is_left_out():
    assert MODELS.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_scores_and_resumes(name, small_models, tmp_path):
    write_files(made_files(name), tmp_path / "rows")
    recipe = smaller(name, tmp_path / "rows", small_models(name))
    found = forecast(recipe, name, Observer())
    trains_scores_and_resumes(recipe, tmp_path)
    is_what_was_checked(found, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "quickstart"])
def test_a_recipe_runs_on_real_rows_at_a_reduced_size(name, real_data, small_models, tmp_path):
    write_files(real_files(name, real_data), tmp_path / "rows")
    recipe = smaller(name, tmp_path / "rows", small_models(name))
    trains_scores_and_resumes(recipe, tmp_path)


@pytest.mark.slow
def test_e2e_is_scored_by_its_five_metrics(real_data, small_models, tmp_path):
    if faults := metric_faults(load_recipe(RECIPES["e2e"]).task.generation.metrics):
        pytest.skip("; ".join(faults))
    write_files(real_files("e2e", real_data), tmp_path / "rows")
    recipe = smaller("e2e", tmp_path / "rows", small_models("e2e"), java=True)
    found = run(recipe, tmp_path / "run").records[-1].metrics
    assert {"e2e_bleu", "nist", "meteor", "rouge_l", "cider"} <= found.keys()


def test_commonsense_is_scored_on_its_eight_sets():
    recipe = load_recipe(RECIPES["commonsense"])
    of_sets = {x: recipe.of_set(x) for x in recipe.evaluation.sets} | {"openbookqa": recipe}
    assert of_sets.keys() == COMMONSENSE.keys()
    for name, own in of_sets.items():
        folder, answers = COMMONSENSE[name]
        assert own.data.validation == f"dataset/{folder}/test.json"
        assert own.task.generation.metrics == (name,)
        assert {*answers} <= {*own.task.choices.answers}
