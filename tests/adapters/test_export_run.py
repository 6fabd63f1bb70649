"""What a finished run leaves to its users, as they load it."""

from __future__ import annotations

import json
import shlex
import shutil

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from fedexlora.adapters.export import ExportOptions, export_run
from fedexlora.errors import BridgeError
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.cli.invoke import fedexlora
from tests.rounds.conftest import files
from tests.rounds.hub import hub_stand_in


def logits(model):
    ids = torch.arange(4, 20).reshape(2, 8)
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


def adapted(bert, folder):
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    return PeftModel.from_pretrained(base, str(folder))


def test_without_a_rank_the_adapter_is_the_runs_own(whole, tmp_path):
    record = export_run(whole, tmp_path / "out", ExportOptions(evaluate=True))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    assert record.error == 0.0
    assert record.exported_metrics["accuracy"] == record.metrics["accuracy"]
    assert record.exported_metrics["f1"] == record.metrics["f1"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "export.json",
    }


def test_a_rank_says_what_it_leaves_out(whole, tmp_path, bert):
    record = export_run(whole, tmp_path / "out", ExportOptions(rank=1, evaluate=True))
    assert record.rank == 1
    assert 0 < record.error < 1
    assert record.exported_metrics is not None
    assert adapted(bert, tmp_path / "out").peft_config["default"].r == 1
    assert f"{record.error:.2%} of the update" in (tmp_path / "out" / "README.md").read_text()


def test_a_merged_model_says_the_same_as_the_adapter(whole, tmp_path, bert):
    record = export_run(whole, tmp_path / "out", ExportOptions(kind="merged", evaluate=True))
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert model.config.id2label == {0: "x", 1: "y"}
    expected = logits(adapted(bert, whole / "adapter"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert record.exported_metrics["accuracy"] == record.metrics["accuracy"]
    assert 0 < record.rounding < 1e-5
    for path in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), "it names a folder of this machine"


def test_the_card_says_what_it_is_and_is_valid(whole, tmp_path):
    export_run(whole, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    card_data = card.data.to_dict()
    assert card_data["library_name"] == "peft"
    assert card_data["pipeline_tag"] == "text-classification"
    assert "base_model" not in card_data  # a folder of this machine is none of the hub's models
    header = json.loads((whole / "run.json").read_text())
    for said in ("FedEx-LoRA", "3 clients", "in every round the model applied", "accuracy"):
        assert said in card.text
    assert f"{sum(header['clients'].values())} training rows" in card.text


def test_a_run_that_has_not_ended_is_refused_with_the_way_out(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    done = fedexlora("export", tmp_path / "run", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "has not ended" in done.stderr
    assert "--resume" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "0"], "--rank: expected at least 1"),
        (["--rank", "1", "--tolerance", "0.1"], "not both"),
        (["--as", "merged", "--base", "./none"], "no such folder"),
    ],
)
def test_options_that_cannot_be_used_write_nothing(whole, tmp_path, words, message):
    done = fedexlora("export", whole, "--out", tmp_path / "out", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_no_run_and_an_existing_folder_are_refused(whole, tmp_path):
    done = fedexlora("export", tmp_path, "--out", tmp_path / "out")
    assert (done.returncode, "found no recipe.toml" in done.stderr) == (2, True)
    before = files(whole)
    done = fedexlora("export", whole, "--out", whole)
    assert (done.returncode, "already exists" in done.stderr) == (2, True)
    assert files(whole) == before


def test_the_command_prints_what_was_left_out_and_json(whole, tmp_path):
    done = fedexlora("export", whole, "--out", tmp_path / "a", "--rank", "1", "--evaluate")
    assert done.returncode == 0, done.stderr
    for said in ("of the update; rank 1", "as exported", "accuracy"):
        assert said in done.stdout
    done = fedexlora("export", whole, "--out", tmp_path / "b", "--json")
    assert json.loads(done.stdout)["error"] == 0.0


@pytest.fixture
def hub(monkeypatch):
    with hub_stand_in() as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        yield served


def test_an_upload_happens_only_when_it_is_asked_for(whole, tmp_path, hub):
    export_run(whole, tmp_path / "kept")
    assert not hub.repositories
    options = ExportOptions(push_to="lab/topics")
    record = export_run(whole, tmp_path / "sent", options)
    assert record.pushed_to == f"{hub.endpoint}/lab/topics"
    assert hub.repositories["lab/topics"]["visibility"] == "private"
    assert hub.files == files(tmp_path / "sent")
    assert 'folder = "lab/topics"' in (tmp_path / "sent" / "README.md").read_text()


def test_a_refused_upload_exits_1_and_keeps_the_folder(whole, tmp_path, hub):
    hub.refuses = True
    done = fedexlora("export", whole, "--out", tmp_path / "out", "--push", "lab/topics")
    assert done.returncode == 1
    assert "--push lab/topics: the upload failed" in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_an_adapter_beside_bfloat16_weights(document, tmp_path, bert):
    document["model"]["dtype"] = "bfloat16"
    folder = tmp_path / "run"
    run(parse_recipe(document, "bf16"), folder)
    record = export_run(folder, tmp_path / "out", ExportOptions(evaluate=True))
    assert record.exported_metrics.keys() == record.metrics.keys()
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}


def spoil(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_every_module_of_an_export_is_held_against_the_last_version(whole, tmp_path):
    """One small module that is off by a little is named, whatever all others together say."""
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    key = min(k for k in load_file(path) if k.endswith("lora_B.weight"))
    spoil(path, lambda tensors: tensors.update({key: tensors[key] * (1 + 1e-5)}))
    for words in ([], ["--as", "merged"]):
        done = fedexlora("export", tmp_path / "run", "--out", tmp_path / "out", *words)
        assert done.returncode == 1, done.stdout
        module = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        assert f"{module}: off by" in " ".join(done.stderr.split())
        assert not (tmp_path / "out").exists()


def test_the_worst_module_is_recorded_and_printed(whole, tmp_path):
    done = fedexlora("export", whole, "--out", tmp_path / "a", "--rank", "1", "--uniform-rank")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "a" / "export.json").read_text())
    assert record["worst_module"] in " ".join(done.stdout.split())
    assert 0 < record["worst_error"] < 1
    held = json.loads((whole / "adapter.json").read_text())
    assert held["worst_error"] < 1e-6
    assert held["worst_module"]


def test_a_missing_version_is_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "versions")
    done = fedexlora("export", tmp_path / "run", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "measured against the last version" in " ".join(done.stderr.split())


def test_an_adapter_is_no_base_and_the_refusal_s_command_makes_one(
    whole, document, tmp_path, monkeypatch
):
    """The next federation starts from what the last one left: merged, by the said command."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole / "adapter", "last")
    document["model"]["source"] = "./last"
    with pytest.raises(BridgeError, match=r"is an adapter \(adapter_config.json\)") as caught:
        run(parse_recipe(document, "next"), tmp_path / "next")
    assert not (tmp_path / "next").exists()
    command, setting = caught.value.faults
    words = shlex.split(command.partition("merge it first: fedexlora ")[2])
    assert fedexlora(*words).returncode == 0
    assert (tmp_path / json.loads(setting.partition(" = ")[2]) / "config.json").is_file()
