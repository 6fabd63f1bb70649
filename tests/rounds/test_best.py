"""Early stopping, and the adapter of the best version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedexlora.adapters.finished_run import read_finished
from fedexlora.errors import RecipeError
from fedexlora.peft_bridge.export import save_global
from fedexlora.rounds.best import Selection
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.prepared import Prepared
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.rounds.conftest import files, recipe_document, records_without_times

SCORES = [0.2, 0.5, 0.4, 0.7, 0.7, 0.1, 0.3, 0.9]
"""Of the versions, from 0."""


def recipe(bert, data_folder, **federation: object):
    document = recipe_document(bert, data_folder)
    document["federation"] |= {"rounds": 7, **federation}
    return parse_recipe(document, "test")


@pytest.fixture
def scores(monkeypatch):
    """Versions have these scores, whatever they are worth."""

    def script(values: list[float], start: int = 0) -> None:
        found = iter(values[start:])
        monkeypatch.setattr(
            Prepared, "evaluate", lambda self, observer: {"loss": 1.0, "accuracy": next(found)}
        )

    return script


def said(folder: Path) -> dict:
    return json.loads((folder / "adapter.json").read_text())


def test_a_run_ends_after_as_many_versions_without_a_better_score(
    bert, data_folder, tmp_path, scores
):
    scores(SCORES)
    result = run(recipe(bert, data_folder, patience=3), tmp_path / "run")
    assert [record.round for record in result.records] == [1, 2, 3, 4, 5, 6]
    best = {"version": 3, "metric": "accuracy", "score": 0.7}
    assert said(tmp_path / "run")["best"] == best
    assert said(tmp_path / "run")["version"] == 6
    assert len(read_finished(tmp_path / "run").records) == 6
    prepared, _ = prepare(recipe(bert, data_folder), Observer())
    (tmp_path / "wanted").mkdir()
    save_global(prepared.model, RunFolder(tmp_path / "run").store.state(3), tmp_path / "wanted")
    assert files(tmp_path / "run" / "adapter-best") == files(tmp_path / "wanted")


def test_a_stopped_run_goes_on_only_with_more_patience(bert, data_folder, tmp_path, scores):
    out = tmp_path / "run"
    scores(SCORES)
    run(recipe(bert, data_folder, patience=1), out)
    assert said(out) | {"worst_error": 0, "worst_module": ""} == {
        "version": 2,
        "stopped": True,
        "worst_module": "",
        "worst_error": 0,
        "best": {"version": 1, "metric": "accuracy", "score": 0.5},
    }
    before = files(out)
    run(recipe(bert, data_folder, patience=1), out, resume=True)
    assert files(out) == before
    scores(SCORES, 3)
    run(recipe(bert, data_folder, patience=4), out, resume=True)
    scores(SCORES)
    run(recipe(bert, data_folder, patience=4), tmp_path / "whole")
    assert said(out) == said(tmp_path / "whole")
    assert said(out)["best"]["version"] == 7
    assert not said(out)["stopped"]
    assert records_without_times(out) == records_without_times(tmp_path / "whole")
    for name in ("adapter", "adapter-best"):
        assert files(out / name) == files(tmp_path / "whole" / name)
    assert files(out / "adapter") == files(out / "adapter-best")


def test_less_of_a_loss_is_better(bert, data_folder):
    parsed = recipe(bert, data_folder)
    task = parsed.task.model_copy(update={"metrics": ("loss",)})
    lower = Selection.of(parsed.model_copy(update={"task": task}), {"loss": 2.0}, ())
    for version, loss in ((1, 1.0), (2, 1.5), (3, 1.0)):
        lower.see(version, {"loss": loss})
    assert lower.kept == 1


def test_patience_without_scores_is_refused(bert, data_folder):
    document = recipe_document(bert, data_folder) | {"evaluation": {"where": "none"}}
    document["federation"]["patience"] = 2
    with pytest.raises(RecipeError, match="federation.patience: there are no scores"):
        parse_recipe(document, "test")


def test_the_clients_scores_end_a_run_and_choose_its_best_version(bert, data_folder, tmp_path):
    """A version is scored a round later, so that the run ends a round later."""
    document = recipe_document(bert, data_folder)
    document["federation"] |= {"rounds": 30, "patience": 2}
    document["training"]["learning_rate"] = 0.3  # it soon gets worse
    document["evaluation"] = {"where": "clients", "holdout": 0.3}
    run(parse_recipe(document, "test"), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    records, finish = folder.read_records(30), folder.read_finish()
    values = [x.scores.pooled["accuracy"] for x in (*records, finish)]
    assert len(records) < 30
    assert finish.version == len(records)
    best = max(range(len(values)), key=lambda i: (values[i], -i))
    assert said(tmp_path / "run")["best"]["version"] == best
    assert (tmp_path / "run" / "adapter-best" / "adapter_config.json").exists()
