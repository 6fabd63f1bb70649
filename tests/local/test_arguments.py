"""The ``[training]`` table: what is known before a run, and runs that end in no number."""

from __future__ import annotations

import json
import shutil

import pytest
import tomlkit
import torch
from transformers import BertForMaskedLM

from fedexlora.adapters.export import ExportOptions, export_run
from fedexlora.adapters.rescore import rescore
from fedexlora.errors import RecipeError
from fedexlora.local.arguments import training_faults
from fedexlora.rounds import environment
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.recipe import load_recipe, parse_recipe
from fedexlora.rounds.run import run
from tests.cli.invoke import fedexlora


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"learning_rate": "fast"}, "training.learning_rate: expected float, found 'fast'"),
        ({"learning_rate": float("nan")}, "training.learning_rate: expected a finite number"),
        ({"learning_rate": 0.0}, "training.learning_rate: expected a number above 0"),
        ({"num_train_epochs": 0}, "training.num_train_epochs: expected a number above 0"),
        ({"max_steps": 0}, "training.max_steps: expected at least 1, or -1"),
        ({"max_steps": 1.5}, "training.max_steps: expected int, found 1.5"),
        ({"per_device_train_batch_size": 0}, "train_batch_size: expected at least 1, found 0"),
        ({"gradient_accumulation_steps": -1}, "accumulation_steps: expected at least 1, found -1"),
        ({"bf16": "yes"}, "training.bf16: expected bool, found 'yes'"),
        ({"bf16": True, "fp16": True}, "training: "),
        ({"report_to": "wandb"}, "training: report_to = 'wandb': "),
        ({"optim": "adam_w"}, "training: "),
        ({"deepspeed": "ds.json"}, "a client trains in one process, on one device"),
        ({"fsdp": "full_shard"}, "a client trains in one process, on one device"),
        ({"use_liger_kernel": True}, "it changes transformers for the whole process"),
        ({"per_device_eval_batch_size": 4}, "it is evaluation.batch_size"),
        ({"bf16_full_eval": True}, "it is evaluation.dtype"),
        ({"lr_scheduler_kwargs": {"min_lr": float("inf")}}, "expected a finite number"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "'reduce_lr_on_plateau' follows scores"),
        ({"schedule": "epoch"}, "training.schedule: expected Literal['round', 'run'], found 'ep"),
        ({"shedule": "run"}, "no such field; did you mean 'schedule'?"),
        ({"schedule": "run", "optim": "schedule_free_adamw"}, "training.schedule: 'run' sets the"),
        ({"device": "gpu"}, "training.device: expected auto, cpu, cuda, cuda:N or mps; found 'g"),
        ({"device": "cuda:0"}, "training.device: 'cuda:0' is not use_cpu = true"),
    ],
)
def test_what_cannot_be_is_known_from_the_recipe(options, fault):
    (found,) = training_faults({"use_cpu": True, **options})
    assert fault in found


def test_what_can_be_is_taken():
    options = {"learning_rate": 1, "warmup_steps": 0.1, "lr_scheduler_type": "cosine"}
    options |= {"schedule": "run", "device": "cpu"}
    options |= {"optim": "adafactor", "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert training_faults({"use_cpu": True, **options}) == []


@pytest.mark.parametrize("arithmetic", ["bf16", "tf32"])
def test_a_run_of_another_machines_arithmetic_is_exported_and_scored_here(
    document, tmp_path, monkeypatch, arithmetic
):
    """Where there is no GPU, and the recipe means one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    document["federation"]["rounds"] = 1
    folder = tmp_path / "run"
    run(parse_recipe(document, "test"), folder)
    text = (folder / "recipe.toml").read_text().replace("use_cpu = true", f"{arithmetic} = true")
    (folder / "recipe.toml").write_text(text)
    other = load_recipe(folder / "recipe.toml")
    record = export_run(folder, tmp_path / "out", ExportOptions(evaluate=True))
    assert record.exported_metrics is not None
    with pytest.raises(RecipeError, match="this machine cannot train so"):
        run(other, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_all_faults_of_a_table_are_said_at_once():
    options = {"learning_rate": -1.0, "num_train_epochs": 0, "max_steps": 0, "seed": 1}
    assert len(training_faults(options)) == 4


def test_labels_of_a_regression_are_not_smoothed(document):
    document["task"] = {"kind": "regression", "text": "text", "label": "label"}
    document["training"]["label_smoothing_factor"] = 0.1
    with pytest.raises(RecipeError, match="numbers are no classes"):
        parse_recipe(document, "test")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 500}, "site-south: "),
        ({"optim": "galore_adamw"}, "galore_torch"),
        ({"eval_strategy": "epoch"}, "it is fixed"),
    ],
)
def test_the_command_says_it_with_code_2_and_writes_nothing(document, tmp_path, training, message):
    document["training"] |= training
    (tmp_path / "recipe.toml").write_text(tomlkit.dumps(document))
    done = fedexlora("run", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_no_number_is_refused_before_anything_is_written(document, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(document["model"]["source"], folder)
    model = BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    document["model"]["source"] = str(folder)
    with pytest.raises(RecipeError, match="the loss of its first step is nan"):
        run(parse_recipe(document, "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_ends_with_code_1_and_names_the_round(document, tmp_path):
    document["training"] |= {"learning_rate": 9e14, "max_steps": 1}
    document["lora"]["modules_to_save"].append("LayerNorm")  # whose outputs then overflow
    (tmp_path / "recipe.toml").write_text(tomlkit.dumps(document))
    done = fedexlora("run", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "round 1: the global model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()
    assert (tmp_path / "run" / "rounds.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "training",
    [
        {"bf16": True},
        {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ],
)
def test_scores_of_a_run_are_those_of_its_adapter_loaded_anew(document, tmp_path, training):
    document["training"] |= training
    document["federation"]["rounds"] = 2
    parsed = parse_recipe(document, "test")
    result = run(parsed, tmp_path / "run")
    fresh = rescore(parsed, result.adapter).metrics
    assert fresh == pytest.approx(dict(result.records[-1].metrics), abs=1e-6)


class Noted(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, what: str) -> None:
        self.notes.append(what)


def test_a_resume_says_in_what_software_it_differs_and_keeps_it(document, tmp_path, monkeypatch):
    def resume(rounds: int) -> list[str]:
        document["federation"]["rounds"] = rounds
        noted = Noted()
        run(parse_recipe(document, "test"), tmp_path / "run", resume=True, observer=noted)
        return [note for note in noted.notes if "there" in note]

    assert resume(1) == []
    assert "resumed" not in json.loads((tmp_path / "run" / "run.json").read_text())
    real = environment.version
    monkeypatch.setattr(
        environment, "version", lambda name: "9.9" if name == "peft" else real(name)
    )
    monkeypatch.setattr(environment, "__version__", "0.0.0")
    said = resume(2)
    assert [note.split(": ")[1].split()[0] for note in said] == ["fedexlora", "peft"]
    assert all(note.endswith((" 0.0.0 here", " 9.9 here")) for note in said)
    assert resume(3) == [], "it is what the run goes on with"
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    (resumed,) = header["resumed"]
    assert resumed["after_round"] == 1
    assert resumed["packages"]["peft"] == "9.9" != header["packages"]["peft"]
    assert header["machine"]["device"] == "cpu"


def test_a_process_of_a_distributed_launcher_is_refused(monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    (fault,) = training_faults({"use_cpu": True})
    assert "one of 2 processes" in fault


def test_checking_a_table_leaves_the_process_as_it_is(monkeypatch):
    from transformers import training_args

    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    before = torch.backends.fp32_precision
    assert training_faults({"use_cpu": True, "tf32": True}) == []
    assert torch.backends.fp32_precision == before
