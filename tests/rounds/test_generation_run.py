"""Runs that are scored by what the model writes, and the command that scores what is finished."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tomlkit

from fedexlora.adapters.evaluation import evaluate
from fedexlora.adapters.export import ExportOptions, export_run
from fedexlora.data.generation import Generation
from fedexlora.data.score import INSTALL, Score
from fedexlora.errors import DataError, InputError, RecipeError, ResumeError
from fedexlora.flower.node import recipe_for_nodes
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.cli.invoke import fedexlora
from tests.data.test_text_metrics import needs_java
from tests.rounds.conftest import records_without_times
from tests.rounds.test_run import StopAt, same_run

GENERATION = {"metrics": ["bleu", "gsm8k"], "max_new_tokens": 5, "num_beams": 2, "batch_size": 4}
MORE = {
    "data": {"validation": "more"},
    "task": {"prompt_template": "{prompt} w1", "metrics": ["loss"]}
    | {"generation": {"metrics": ["gsm8k"]}},
}
WRITTEN = {"bleu", "gsm8k", "generation/unfinished", "gsm8k/unparsed"}
OF_MORE = {"more.loss", "more.gsm8k", "more.generation/unfinished", "more.gsm8k/unparsed"}


def texts(count: int) -> list[dict[str, str]]:
    """Half of the prompts are there twice; the answers count on from them."""
    made = []
    for i in range(count):
        first = (i // 2 * 3) % 13
        words = " ".join(f"w{first + j}" for j in range(1, 5))
        made.append({"prompt": f"w{first} w{first}", "answer": f"{words} {first + i % 2}"})
    return made


@pytest.fixture(scope="session")
def generating(gpt2, tmp_path_factory) -> dict:
    """A recipe that generates, as a TOML parser gives it."""
    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("train", 24), ("validation", 10), ("more", 6)):
        lines = "\n".join(map(json.dumps, texts(count)))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {
        "model": {"source": gpt2},
        "task": {"kind": "causal-lm", "prompt": "prompt", "completion": "answer"}
        | {"max_length": 16, "generation": GENERATION},
        "data": {"source": str(folder)},
        "partition": {"kind": "iid", "clients": 3},
        "federation": {"rounds": 3, "seed": 1},
        "evaluation": {"every": 2, "sets": {"more": MORE}},
        "lora": {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "training": {"learning_rate": 3e-2, "per_device_train_batch_size": 4, "use_cpu": True},
    }


@pytest.fixture(scope="session")
def written(generating, tmp_path_factory) -> Path:
    """The folder of its run; tests only read it."""
    out = tmp_path_factory.mktemp("written") / "run"
    run(parse_recipe(generating, "test"), out)
    return out


def test_scores_of_texts_are_recorded_every_second_round_and_after_the_last(written):
    metrics = [record["metrics"] for record in records_without_times(written)]
    assert metrics[0] == {}
    for found in metrics[1:]:
        assert set(found) == {"loss", "perplexity"} | WRITTEN | OF_MORE
    header = json.loads((written / "run.json").read_text())
    assert header["headline"] == "bleu"
    assert set(header["initial_metrics"]) == set(metrics[1])
    assert re.fullmatch(r"sacrebleu \d.*", header["scorers"]["bleu"]["version"])
    assert header["scorers"]["more.gsm8k"] == header["scorers"]["gsm8k"]
    assert set(header["scorers"]) == {"bleu", "gsm8k", "more.gsm8k"}


def test_a_run_that_generates_resumes_to_the_same_bits(generating, written, tmp_path):
    parsed = parse_recipe(generating, "test")
    with pytest.raises(KeyboardInterrupt):
        run(parsed, tmp_path / "run", observer=StopAt(2, "evaluate"))
    run(parsed, tmp_path / "run", resume=True)
    same_run(written, tmp_path / "run")


def test_no_certificate_waits_for_texts(generating, monkeypatch):
    prepared, _ = prepare(parse_recipe(generating, "test"), Observer())
    monkeypatch.setattr(Generation, "evaluate", lambda *_: pytest.fail("it generates"))
    for read in prepared.forwards.values():
        read()


def test_a_set_is_scored_as_a_recipe_of_its_own(generating, written, tmp_path):
    recipe = parse_recipe(generating, "test").of_set("more")
    assert recipe.task.generation.num_beams == GENERATION["num_beams"]
    (tmp_path / "more.toml").write_text(recipe.to_toml(), encoding="utf-8")
    alone = evaluate(str(written / "adapter"), tmp_path / "more.toml")
    assert alone.rows == 6
    recorded = records_without_times(written)[-1]["metrics"]
    found = {f"more.{name}": value for name, value in alone.metrics.items()}
    close(found, {name: recorded[name] for name in OF_MORE})


def test_a_set_of_classes_has_the_labels_of_the_model(document, data_folder, tmp_path):
    lines = (data_folder / "validation.jsonl").read_text().splitlines()
    only = [line for line in lines if json.loads(line)["label"] == "y"]
    (tmp_path / "only.jsonl").write_text("\n".join(only))
    table = {"data": {"source": str(tmp_path), "validation": "only"}}
    document["evaluation"] = {"sets": {"only-y": table, "same": {}}}
    prepared, _ = prepare(parse_recipe(document, "test"), Observer())
    scores = prepared.evaluate(Observer())
    assert {f"same.{name}": scores[name] for name in ("accuracy", "f1", "loss")} == {
        name: value for name, value in scores.items() if name.startswith("same.")
    }
    share = len(only) / len(lines)
    right = scores["only-y.accuracy"] * share
    assert right <= scores["accuracy"] <= right + 1 - share


def test_the_likeliest_of_a_rows_answers_is_a_score_beside_the_others(generating, tmp_path):
    choices = {"answers": [f"w{i}" for i in range(20)], "template": "w1 {choice}"}
    table = {**generating["task"], "prompt_template": "{prompt} w19", "completion": "one"}
    rows = [{"prompt": f"w{i}", "one": "w19" if i % 2 else f"w{i}"} for i in range(6)]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"source": str(tmp_path), "train": "choices", "validation": "choices"}
    del table["generation"]
    document = {**generating, "data": data, "task": table | {"choices": choices}}
    prepared, _ = prepare(parse_recipe({**document, "evaluation": {}}, "test"), Observer())
    scores = prepared.evaluate(Observer())
    assert set(scores) == {"loss", "perplexity", "choice_accuracy"}
    assert scores["choice_accuracy"] * 6 == pytest.approx(round(scores["choice_accuracy"] * 6))


def test_the_rows_of_a_set_are_part_of_a_runs_data(generating, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(generating["data"]["source"], data)
    document = {**generating, "data": {"source": str(data)}, "federation": {"rounds": 1}}
    run(parse_recipe(document, "test"), out)
    (data / "more.jsonl").write_text(json.dumps(texts(1)[0]), encoding="utf-8")
    document["federation"] = {"rounds": 2}
    with pytest.raises(ResumeError, match="other data"):
        run(parse_recipe(document, "test"), out, resume=True)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"task": {"promt": "x"}}, "evaluation.sets.more.task.promt: unknown key; did you mean"),
        ({"task": {"kind": "regression"}}, "evaluation.sets.more.task.kind: the model is one for"),
        ({"task": {"generation": {"metrics": ["x"]}}}, "evaluation.sets.more.task.generation"),
        ({"task": {"generation": 3}}, "evaluation.sets.more.task.generation"),
        ({"data": {"train": "x"}}, "evaluation.sets.more.data.train: has no effect"),
        ({"dta": {}}, "evaluation.sets.more.dta: unknown key; did you mean 'data'"),
    ],
)
def test_a_fault_of_a_set_names_its_key(generating, table, said):
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**generating, "evaluation": {"sets": {"more": table}}}, "test")
    assert said in str(caught.value)


def test_a_set_that_is_not_there_leaves_no_folder(generating, tmp_path):
    document = {**generating, "evaluation": {"sets": {"more": {"data": {"validation": "none"}}}}}
    with pytest.raises(DataError, match="none"):
        run(parse_recipe(document, "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (["bleu"], "evaluation.mean: tuple should have at least 2 items"),
        (
            ["gsm8k", "mor.gsm8k"],
            "evaluation.mean: the recipe has no score 'mor.gsm8k'; did you mean 'more.gsm8k'?",
        ),
        (["gsm8k", "more.gsm8k/unparsed"], "no score 'more.gsm8k/unparsed'; did you mean 'more."),
        (["gsm8k", "x"], "no score 'x'; known here: loss, perplexity, bleu, gsm8k, more.loss"),
        (["gsm8k", "gsm8k"], "evaluation.mean: 'gsm8k' stands there 2 times"),
        (
            ["bleu", "more.gsm8k"],
            "evaluation.mean: expected one metric of several sets, or shares of right answers",
        ),
    ],
)
def test_a_mean_of_what_is_no_score_or_of_different_ones_is_refused(generating, mean, said):
    document = {**generating, "evaluation": {"sets": {"more": MORE}, "mean": mean}}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(document, "test")
    assert said in str(caught.value)


def test_a_mean_has_no_value_where_one_of_its_scores_has_none(generating, monkeypatch):
    more = {**MORE, "task": {"generation": {"metrics": ["bleu", "gsm8k"]}}}
    evaluation = {"sets": {"more": more}, "mean": ["bleu", "more.bleu"]}
    recipe = parse_recipe({**generating, "evaluation": evaluation}, "test")
    prepared, _ = prepare(recipe, Observer())
    scores = prepared.evaluate(Observer())
    assert scores["mean"] == (scores["bleu"] + scores["more.bleu"]) / 2
    failing = iter([None, "it ended with code 1"])

    def score(names, texts, references):
        reason = next(failing)
        return [Score("bleu", None if reason else 3.0, reason, "a program", "1.0")]

    monkeypatch.setattr("fedexlora.data.generation.text_scores", score)
    scores = prepared.evaluate(Observer())
    assert (scores["bleu"], scores["more.bleu/uncomputed"]) == (3.0, 1.0)
    assert scores["mean/uncomputed"] == 1.0
    assert "mean" not in scores


E2E = ["e2e_bleu", "nist", "meteor", "rouge_l", "cider"]


@needs_java
def test_the_five_metrics_of_e2e_are_computed_in_a_run(generating, tmp_path):
    table = {**GENERATION, "metrics": E2E}
    document = {
        **generating,
        "task": {**generating["task"], "generation": table},
        "federation": {"rounds": 1, "seed": 1},
        "evaluation": {},
    }
    (tmp_path / "recipe.toml").write_text(tomlkit.dumps(document), encoding="utf-8")
    out = tmp_path / "run"
    done = fedexlora("run", tmp_path / "recipe.toml", "--out", out, columns=300)
    assert done.returncode == 0, done.stderr
    header = json.loads((out / "run.json").read_text())
    (record,) = records_without_times(out)
    for scores in (header["initial_metrics"], record["metrics"]):
        assert set(E2E) <= set(scores)
        assert not [name for name in scores if name.endswith("/uncomputed")]
    versions = {name: scorer["version"] for name, scorer in header["scorers"].items()}
    assert list(versions) == E2E
    for name in E2E[2:]:
        assert re.fullmatch(r"pycocoevalcap [\d.]+, java [\d._]+.*", versions[name])
    found = evaluate(str(out))
    close(found.metrics, record["metrics"])
    export_run(out, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for title, name in (("METEOR", "meteor"), ("ROUGE-L", "rouge_l"), ("CIDEr", "cider")):
        cells = [f"{x[name]:.4f}" for x in (header["initial_metrics"], record["metrics"])]
        assert f"| {title} | {' | '.join(cells)} |" in card
        assert cells[1] in done.stdout


@pytest.mark.parametrize("absent", ["java", "pycocoevalcap"])
def test_what_the_metrics_in_java_lack_is_named_before_the_run(
    absent, generating, monkeypatch, tmp_path
):
    monkeypatch.setattr(
        "fedexlora.data.score._version", lambda name: None if name == absent else "1.0"
    )
    table = {**GENERATION, "metrics": E2E}
    document = {**generating, "task": {**generating["task"], "generation": table}}
    with pytest.raises(DataError, match="task.generation.metrics cannot be computed") as caught:
        run(parse_recipe(document, "test"), tmp_path / "run")
    expected = [f"{name}: {absent} is missing: {INSTALL[absent]}" for name in E2E[2:]]
    assert list(caught.value.faults) == expected
    assert not (tmp_path / "run").exists()


def test_nodes_are_not_told_of_it(generating):
    recipe = parse_recipe(generating, "test")
    sent = recipe_for_nodes(recipe, recipe.task.model_dump(mode="json", exclude_none=True))
    assert "generation" not in sent["task"]
    assert "evaluation" not in sent


def test_a_metric_that_this_machine_lacks_leaves_no_folder(generating, monkeypatch, tmp_path):
    monkeypatch.setattr("fedexlora.data.score._version", lambda name: None)
    with pytest.raises(DataError, match="bleu: sacrebleu is missing: pip install"):
        run(parse_recipe(generating, "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_terminal_and_the_card_show_rounds_without_scores(generating, written, tmp_path):
    (tmp_path / "recipe.toml").write_text(tomlkit.dumps(generating), encoding="utf-8")
    again = tmp_path / "run"
    shutil.copytree(written, again)
    done = fedexlora("run", tmp_path / "recipe.toml", "--out", again, "--resume", columns=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ +(start|\d) (.*)$", done.stdout, re.M)
    assert [name for name, _ in rows] == ["start", "1", "2", "3"]
    scored = [len(cells.split()) for _, cells in rows]
    assert scored == [10, 5, 15, 15]
    export_run(written, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    last = records_without_times(written)[-1]["metrics"]
    assert f"| {last['bleu']:.4f} |" in card
    assert f"| {last['gsm8k/unparsed']:.0f} |" in card


def close(found: dict, expected: dict) -> None:
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_and_its_adapter_score_as_the_run_recorded(generating, written, tmp_path):
    recorded = records_without_times(written)[-1]["metrics"]
    task = tmp_path / "recipe.toml"
    task.write_text(tomlkit.dumps(generating), encoding="utf-8")
    of_run = evaluate(str(written))
    assert (of_run.kind, of_run.rows, of_run.recorded) == ("run", 10, recorded)
    close(of_run.metrics, recorded)
    of_adapter = evaluate(str(written / "adapter"), task)
    assert (of_adapter.kind, of_adapter.recorded) == ("adapter", None)
    assert of_adapter.metrics == of_run.metrics
    export_run(written, tmp_path / "merged", ExportOptions(kind="merged"))
    of_merged = evaluate(str(tmp_path / "merged"), task)
    assert of_merged.kind == "model"
    close(of_merged.metrics, recorded)


def test_a_plain_model_scores_as_the_run_did_before_round_1(generating, written, tmp_path, gpt2):
    task = tmp_path / "recipe.toml"
    elsewhere = {**generating, "model": {"source": "no-such-model"}}
    task.write_text(tomlkit.dumps(elsewhere), encoding="utf-8")
    record = evaluate(gpt2, task)
    assert record.base == gpt2
    assert record.metrics == json.loads((written / "run.json").read_text())["initial_metrics"]


def test_the_base_of_an_adapter_is_the_one_that_it_names(generating, written, tmp_path, gpt2):
    task, moved = tmp_path / "recipe.toml", tmp_path / "moved"
    elsewhere = {**generating, "model": {"source": "no-such-model"}}
    task.write_text(tomlkit.dumps(elsewhere), encoding="utf-8")
    shutil.copytree(written / "adapter", moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/moved/away"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its base is a folder that is not here: /moved/away"):
        evaluate(str(moved), task)
    named = evaluate(str(moved), task, [f"model.source={gpt2}"])
    config["base_model_name_or_path"] = gpt2
    (moved / "adapter_config.json").write_text(json.dumps(config))
    assert evaluate(str(moved), task).metrics == named.metrics


def test_a_run_of_classes_needs_no_training_rows(whole, document, data_folder, tmp_path):
    shutil.copy(data_folder / "validation.jsonl", tmp_path)
    changed = [f"data.source={tmp_path}"]
    recorded = records_without_times(whole)[-1]["metrics"]
    close(evaluate(str(whole)).metrics, recorded)
    elsewhere = evaluate(str(whole), overrides=changed)
    close(elsewhere.metrics, recorded)
    assert elsewhere.recorded is None


def test_the_command_prints_a_table_or_json(written):
    recorded = records_without_times(written)[-1]["metrics"]
    bleu = f"{recorded['bleu']:.4f}"
    for columns in (30, 80):
        done = fedexlora("evaluate", written, columns=columns)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(bleu) == 2
        assert "sacrebleu" in done.stdout
        assert "…" not in done.stdout
    assert re.search(rf"bleu +{bleu} +{bleu}", done.stdout)
    found = json.loads(fedexlora("evaluate", written, "--json").stdout)
    assert found["metrics"]["bleu"] == recorded["bleu"]
    smaller = ["--set", "data.max_validation_rows=4", "--json"]
    found = json.loads(fedexlora("evaluate", written, *smaller).stdout)
    assert (found["rows"], found["recorded"]) == (4, None)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda run, bert: [run / "adapter"], "--task RECIPE.toml"),
        (lambda run, bert: [run / "nothing", "--task", run / "recipe.toml"], "nothing"),
        (lambda run, bert: [run, "--task", run / "none.toml"], "none.toml: cannot be read"),
        (
            lambda run, bert: (
                [run / "adapter", "--task", run / "recipe.toml", "--set", f"model.source={bert}"]
            ),
            "does not fit the model",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_a_fault_of_input(make, said, written, bert):
    done = fedexlora("evaluate", *make(written, bert))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
