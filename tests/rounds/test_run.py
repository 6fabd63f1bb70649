"""Whole runs: what they leave behind, and that they can be interrupted anywhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomlkit
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fedexlora.adapters.export import export_run
from fedexlora.data.tokenizer import prepare_tokenizer
from fedexlora.errors import (
    BridgeError,
    DataError,
    InputError,
    NoUpdatesError,
    RecipeError,
    ResumeError,
)
from fedexlora.exchange.digest import tensors_digest
from fedexlora.methods import METHODS
from fedexlora.rounds.folder import RunFolder
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.rounds.conftest import files, records_without_times

EXAMPLES = Path(__file__).parents[2] / "examples"


def recipe(document: dict, method: dict | None = None, **federation: object):
    document = document | {"federation": document["federation"] | federation}
    document = document | {"method": document["method"] | (method or {})}
    return parse_recipe(document, "test")


def same_run(one: Path, other: Path) -> None:
    """Adapter, heads, last state and records are equal, bit for bit, but for times."""
    for folder in ("adapter", "adapters"):
        assert (one / folder).is_dir() == (other / folder).is_dir()
        if (one / folder).is_dir():
            assert files(one / folder) == files(other / folder)
    remembered = [(x / "memory").rglob("*.safetensors") for x in (one, other)]
    for mine, theirs in zip(*map(sorted, remembered), strict=True):
        assert mine.name == theirs.name
        assert tensors_digest(load_file(mine)) == tensors_digest(load_file(theirs))
    states = [RunFolder(path).load().state for path in (one, other)]
    assert states[0].version == states[1].version
    for name, factors in states[0].adapter.items():
        assert torch.equal(factors.A, states[1].adapter[name].A)
        assert torch.equal(states[0].total[name].dense(), states[1].total[name].dense())
    assert records_without_times(one) == records_without_times(other)


def test_a_run_leaves_what_the_design_says(document, whole):
    names = {path.name for path in whole.iterdir()}
    wanted = {
        "recipe.toml",
        "run.json",
        "rounds.jsonl",
        "versions",
        "adapter",
        "adapter.json",
        "adapter-best",
        "updates",
    }
    assert names == wanted | {".lock"}
    stored = {path.stem for path in (whole / "versions").iterdir()}
    assert stored == {"snapshot-0000", "step-0001", "step-0002", "step-0003"}
    header = json.loads((whole / "run.json").read_text())
    assert sum(header["clients"].values()) == 36
    assert set(header["clients"]) == {"site-north", "site-south", "site-west"}
    found = RunFolder(whole).load().records
    assert [record.round for record in found] == [1, 2, 3]
    for record in found:
        assert record.certificate.held
        assert record.certificate.error <= record.certificate.allowed
        assert sum(client.weight for client in record.clients) == pytest.approx(1)
        assert {"train", "aggregate", "ship", "certify", "evaluate"} <= record.seconds.keys()
    assert found[-1].metrics["loss"] < header["initial_metrics"]["loss"]
    sent = whole / "updates" / "round-0002" / "site-south"
    assert {path.name for path in sent.iterdir()} >= {"adapter_config.json", "client.json"}
    resolved = tomlkit.parse((whole / "recipe.toml").read_text()).unwrap()
    assert parse_recipe(resolved, "resolved") == recipe(document)


def test_the_adapter_on_the_untouched_base_scores_what_the_last_record_says(document, whole):
    parsed = recipe(document)
    prepared, _ = prepare(parsed, Observer())
    base = AutoModelForSequenceClassification.from_pretrained(
        parsed.model.source, num_labels=2, dtype=torch.float32
    )
    loaded = PeftModel.from_pretrained(base, whole / "adapter")
    tokenizer = prepare_tokenizer(parsed.model.source, None)
    scores = prepared.task.evaluate(loaded, prepared.scoring.validation, tokenizer, 64)
    last = RunFolder(whole).load().records[-1]
    assert scores["accuracy"] == last.metrics["accuracy"]
    assert scores["loss"] == pytest.approx(last.metrics["loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["fedex", "fedit", "ffa"])
def test_the_example_recomputes_the_final_model_from_the_stored_updates(
    document, whole, tmp_path, method
):
    out = tmp_path / "run"
    if method == "fedex":
        shutil.copytree(whole, out)
    else:
        run(recipe(document, method={"name": method}), out, keep_updates=True)
    command = [sys.executable, str(EXAMPLES / "recompute.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 rounds, 4 modules" in done.stdout
    path = out / "updates" / "round-0002" / "site-west" / "client.json"
    path.write_text(path.read_text().replace('"weight": ', '"weight": 9'))
    spoiled = subprocess.run(command, capture_output=True, check=False)
    assert (spoiled.returncode == 0) == (method != "fedex"), "only fedex depends on round 2"


class StopAt(Observer):
    """Kills a run at a moment: nothing after it is executed."""

    def __init__(self, round_: int, moment: str) -> None:
        self.round, self.moment = round_, moment

    def training(self, round_: int, client: str, step: int, steps: int) -> None:
        if (round_, self.moment) == (self.round, f"train {client}"):
            raise KeyboardInterrupt

    def phase(self, round_: int, what: str) -> None:
        if (round_, what) == (self.round, self.moment):
            raise KeyboardInterrupt

    def finished_round(self, record) -> None:
        if (record.round, self.moment) == (self.round, "end"):
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("round_", "moment"),
    [(1, "train site-north"), (2, "aggregate"), (2, "evaluate"), (2, "end"), (3, "end")],
)
def test_an_interrupted_run_resumes_to_the_same_bits(document, whole, tmp_path, round_, moment):
    parsed, stopped = recipe(document), tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(parsed, stopped, keep_updates=True, observer=StopAt(round_, moment))
    assert not (stopped / "adapter").exists()
    run(parsed, stopped, resume=True, keep_updates=True)
    same_run(whole, stopped)
    assert files(whole / "updates") == files(stopped / "updates")


def test_a_run_is_repeatable_and_its_seed_matters(document, whole, tmp_path):
    run(recipe(document), tmp_path / "again")
    same_run(whole, tmp_path / "again")
    run(recipe(document, seed=5, rounds=1), tmp_path / "other")
    assert records_without_times(whole)[0] != records_without_times(tmp_path / "other")[0]


def test_more_rounds_are_the_same_as_asking_for_them_at_once(document, whole, tmp_path):
    run(recipe(document, rounds=1), tmp_path / "grown")
    run(recipe(document, rounds=3), tmp_path / "grown", resume=True)
    same_run(whole, tmp_path / "grown")


def test_resume_starts_a_run_that_is_not_there(document, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.toml.tmp").write_text("what a kill left behind")
    run(recipe(document, rounds=1), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "adapter").exists()


@pytest.mark.exactness
@pytest.mark.slow
def test_six_rounds_equal_three_kill_nine_and_three_more(document, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(tomlkit.dumps(document | {"federation": {"rounds": 6, "seed": 4}}))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", "from fedexlora.cli import main; main()", "run", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(whole)], check=True, env=environment)
    child = subprocess.Popen([*command, "--out", str(killed)], env=environment)
    deadline = time.monotonic() + 300
    while not (killed / "versions" / "step-0003.safetensors").exists():
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (killed / "adapter").exists()
    subprocess.run([*command, "--out", str(killed), "--resume"], check=True, env=environment)
    same_run(whole, killed)


def test_a_client_whose_training_diverges_is_left_out_and_named(document, tmp_path):
    """One site's labels and rows are fine; its optimizer is not: the loss becomes NaN."""
    parsed = recipe(document, rounds=2)
    original = torch.nn.functional.cross_entropy
    state = {"calls": 0}

    def diverging(*args, **kwargs):
        state["calls"] += 1
        loss = original(*args, **kwargs)
        return loss * float("nan") if state["calls"] == 2 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", diverging)
        result = run(parsed, tmp_path / "run")
    first = result.records[0]
    assert [left.client for left in first.left_out] == ["site-north"]
    assert "loss: expected a finite number, found nan" in first.left_out[0].reasons
    assert len(first.clients) == 2
    assert first.certificate.held
    assert len(result.records[1].clients) == 3, "it takes part again from the global model"


def test_a_run_without_any_usable_update_stops_with_its_last_version(document, tmp_path):
    document["training"]["learning_rate"] = 1e38
    out = tmp_path / "run"
    with pytest.raises(NoUpdatesError, match="round 1"):
        run(recipe(document), out)
    assert [path.name for path in (out / "versions").iterdir()] == ["snapshot-0000.safetensors"]
    assert not (out / "adapter").exists()


def test_a_folder_with_something_in_it_is_refused(document, whole, data_folder):
    before = files(whole)
    with pytest.raises(ResumeError, match="already holds another run"):
        run(recipe(document), whole)
    changed = document | {"lora": document["lora"] | {"r": 3}}
    with pytest.raises(ResumeError, match="a run of another recipe") as caught:
        run(recipe(changed, seed=9), whole, resume=True)
    assert caught.value.faults == ("federation.seed: 4 there, 9 here", "lora.r: 2 there, 3 here")
    with pytest.raises(ResumeError, match="already holds other files"):
        run(recipe(document), data_folder)
    with pytest.raises(ResumeError, match="finished 3 rounds already"):
        run(recipe(document, rounds=2), whole, resume=True)
    assert files(whole) == before


def test_a_run_is_not_continued_on_other_data(document, whole, tmp_path, data_folder):
    out, moved = tmp_path / "run", tmp_path / "data"
    shutil.copytree(whole, out)
    shutil.copytree(data_folder, moved)
    text = (out / "recipe.toml").read_text().replace(str(data_folder), str(moved))
    (out / "recipe.toml").write_text(text)
    train = moved / "train.jsonl"
    train.write_text(train.read_text().replace("w3", "w4", 1))
    with pytest.raises(ResumeError, match="other data"):
        run(recipe(document | {"data": {"source": str(moved)}}), out, resume=True)


class Told(Observer):
    def __init__(self) -> None:
        self.faults = []

    def passed_over(self, fault: str) -> None:
        self.faults.append(fault)


def test_a_damaged_step_is_named_and_the_version_before_is_used(document, whole, tmp_path):
    out, told = tmp_path / "run", Told()
    shutil.copytree(whole, out)
    path = out / "versions" / "step-0003.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    run(recipe(document), out, resume=True, keep_updates=True, observer=told)
    assert len(told.faults) == 1
    assert "step-0003.safetensors is damaged" in told.faults[0]
    same_run(whole, out)


def test_without_any_whole_snapshot_nothing_is_continued(document, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in (out / "versions").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ResumeError, match="no version can be read") as caught:
        run(recipe(document), out, resume=True)
    assert len(caught.value.faults) == 1
    assert "snapshot-0000.safetensors is damaged" in caught.value.faults[0]


def test_two_processes_cannot_run_in_one_folder(document, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = files(out)
    with RunFolder(out).locked(), pytest.raises(ResumeError, match="another process is running"):
        run(recipe(document), out, resume=True)
    assert files(out) == before


SAMPLED = {"clients_per_round": 2, "rounds": 6, "history": 1}


@pytest.mark.parametrize(
    "changes",
    [{}, {"next_adapter": "keep"}, *({"name": name} for name in METHODS if name != "fedex")],
)
def test_a_sampled_run_resumes_to_the_same_bits_and_traffic(document, tmp_path, changes):
    start = METHODS[changes.get("name", "fedex")].default.start
    if start is not None:
        document["lora"] = document["lora"] | {"init_lora_weights": start[0]}
    parsed = recipe(document, method=changes, **SAMPLED)
    run(parsed, tmp_path / "one")
    for round_, moment in [(2, "aggregate"), (3, "end"), (5, "evaluate")]:
        with pytest.raises(KeyboardInterrupt):
            run(parsed, tmp_path / "other", resume=True, observer=StopAt(round_, moment))
    run(parsed, tmp_path / "other", resume=True)
    same_run(tmp_path / "one", tmp_path / "other")
    found = RunFolder(tmp_path / "one").load().records
    drawn = (1, 1) if parsed.rule.pooled else (2, 3)
    assert all((len(record.clients), record.registered) == drawn for record in found)
    assert all(record.certificate.held for record in found) or not parsed.rule.certified
    since = {(c.since, record.round) for record in found for c in record.clients}
    assert {held for held, _ in since} > {None}, "somebody came back after a pause"


@pytest.mark.parametrize("name", ["flora", "florist"])
def test_factors_are_drawn_also_where_the_server_does_not_score(document, tmp_path, name):
    document["evaluation"] = {"where": "none"}
    alone = run(recipe(document, method={"name": name}, rounds=2), tmp_path / "none")
    del document["evaluation"]
    scored = run(recipe(document, method={"name": name}, rounds=2), tmp_path / "server")
    assert files(alone.adapter) == files(scored.adapter)


def test_what_clients_send_is_not_kept_where_it_is_no_adapter(document, tmp_path):
    with pytest.raises(RecipeError, match="clients of fedsa send no adapters"):
        run(recipe(document, method={"name": "fedsa"}), tmp_path / "run", keep_updates=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match=r"federation\.robust: with fedsa clients send no"):
        recipe(document, method={"name": "fedsa"}, robust="clip")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"task": {"kind": "classification", "text": "text", "label": "lable"}},
            DataError,
            "lable",
        ),
        ({"lora": {"r": 2, "target_modules": ["q_proj"]}}, BridgeError, "q_proj"),
        ({"lora": {"target_modules": ["query"], "use_dora": True}}, BridgeError, "Dora"),
        ({"lora": {"target_modules": ["query"]}}, BridgeError, "modules_to_save = .*pooler.dense"),
        ({"model": {"source": "./nowhere"}}, BridgeError, "nowhere"),
        ({"data": {"source": "./nowhere"}}, DataError, "nowhere"),
        ({"partition": {"kind": "iid", "clients": 37}}, DataError, "client-36"),
    ],
)
def test_bad_input_writes_nothing(document, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run(recipe(document | change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ffa_uploads_half_and_downloads_no_remainder(document, tmp_path):
    """The first round brings version 0 to everybody, the second what the first one left."""
    runs = {
        method: run(recipe(document, rounds=2, method={"name": method}), tmp_path / method).records
        for method in ("fedex", "fedit", "ffa")
    }
    found = {method: records[1] for method, records in runs.items()}
    # An update's header has its loss as text, which has more or fewer digits.
    assert abs(found["fedit"].bytes.up - found["fedex"].bytes.up) < 64
    assert found["ffa"].bytes.up < found["fedit"].bytes.up - 1000
    assert found["ffa"].bytes.down < found["fedit"].bytes.down < found["fedex"].bytes.down
    assert found["ffa"].certificate.held
    assert found["ffa"].deviation == 0.0
    assert runs["fedit"][0].deviation == runs["fedex"][0].deviation > 0.0
    weights = load_file(tmp_path / "ffa" / "adapter" / "adapter_model.safetensors")
    start = RunFolder(tmp_path / "ffa").load().state
    for name, factors in start.adapter.items():
        assert torch.equal(weights[f"base_model.model.{name}.lora_A.weight"], factors.A)


def test_clients_with_models_of_their_own_are_scored_each_and_leave_an_adapter_each(
    document, tmp_path
):
    """Of a method without a global model the score is the plain mean over the clients."""
    result = run(recipe(document, method={"name": "fedsa"}, rounds=2), tmp_path / "run")
    parsed = recipe(document, method={"name": "fedsa"}, rounds=2)
    prepared, _ = prepare(parsed, Observer())
    names = sorted(path.name for path in result.adapter.iterdir())
    assert names == ["site-north", "site-south", "site-west"]
    assert result.adapter == result.folder / "adapters"
    assert not (result.folder / "adapter").exists()
    found = []
    for name in names:
        base = AutoModelForSequenceClassification.from_pretrained(
            parsed.model.source, **prepared.task.model_config
        )
        loaded = PeftModel.from_pretrained(base, result.adapter / name)
        tokenizer = prepare_tokenizer(parsed.model.source, None)
        found.append(prepared.task.evaluate(loaded, prepared.scoring.validation, tokenizer, 64))
    for metric in ("loss", "accuracy"):
        mean = sum(scores[metric] for scores in found) / 3
        assert result.records[-1].metrics[metric] == pytest.approx(mean, rel=1e-5)
    assert len({round(scores["loss"], 6) for scores in found}) == 3
    with pytest.raises(InputError, match="fedsa has one model a client, and no global one"):
        export_run(result.folder, tmp_path / "out")
