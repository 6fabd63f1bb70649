"""``training.schedule = "run"``: one learning-rate schedule over all rounds."""

from __future__ import annotations

import copy
import json
import math

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from fedexlora.errors import ResumeError
from fedexlora.exchange.records import RoundRecord
from fedexlora.local import trainer as trainer_module
from fedexlora.local.arguments import training_faults
from fedexlora.local.trainer import TrainerJob
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.local.test_trainer import build, collate, make_rows
from tests.rounds.conftest import files, records_without_times

ROUNDS, STEPS = 3, 4
"""Seven rows in batches of two: four steps a round."""
BASE = {"use_cpu": True, "optim": "sgd", "learning_rate": 0.3, "per_device_train_batch_size": 2}
CASES = {
    "linear, a share of warm-up": {"warmup_steps": 0.3},
    "cosine, steps of warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 5},
    "constant with warm-up": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5},
    "constant": {"lr_scheduler_type": "constant"},
    "min_lr is told the rate": {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 0.1},
    },
    "two groups, accumulated": {"weight_decay": 0.1, "gradient_accumulation_steps": 2},
}


class Rates(TrainerCallback):
    """Notes the learning rates of every group with which a step is about to be made."""

    def __init__(self) -> None:
        self.found: list[list[float]] = []

    def on_pre_optimizer_step(self, args, state, control, *, optimizer, **_):
        self.found.append([group["lr"] for group in optimizer.param_groups])


@pytest.fixture
def rates(monkeypatch) -> Rates:
    """What all trainings of the test have: they tell a callback of their own."""
    noted = Rates()

    class Watched(trainer_module._Trainer):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            self.add_callback(noted)

    monkeypatch.setattr(trainer_module, "_Trainer", Watched)
    return noted


def one_trainer(options: dict, steps: int, folder: str) -> list[list[float]]:
    """The rates of transformers' own ``Trainer`` over so many steps, without our code."""
    noted = Rates()
    Trainer(
        model=build("classification", "roberta"),
        args=TrainingArguments(
            folder, **{**options, "max_steps": steps}, report_to="none", disable_tqdm=True
        ),
        train_dataset=make_rows("classification").remove_columns("length"),
        data_collator=collate,
        callbacks=[noted],
    ).train()
    return noted.found


@pytest.mark.parametrize("case", CASES)
def test_the_rates_of_all_rounds_are_those_of_one_trainer_of_all_their_steps(case, rates, tmp_path):
    options = {**BASE, **CASES[case]}
    steps = STEPS // options.get("gradient_accumulation_steps", 1)
    rows, start = make_rows("classification"), build("classification", "roberta")
    job = TrainerJob({**options, "schedule": "run"}, collate, ROUNDS)
    for round_ in range(1, ROUNDS + 1):
        job.train(copy.deepcopy(start), rows, seed=round_, round_=round_, on_step=lambda *_: None)
    wanted = one_trainer(options, ROUNDS * steps, str(tmp_path))
    assert len(wanted) == ROUNDS * steps
    assert rates.found == wanted
    if case != "constant":
        assert len({rate for rate, *_ in wanted}) > 2, "the rate moves"


def test_by_default_every_round_begins_a_schedule(rates):
    rows, start = make_rows("classification"), build("classification", "roberta")
    job = TrainerJob({**BASE, "schedule": "round"}, collate, ROUNDS)
    for round_ in (1, 2):
        job.train(copy.deepcopy(start), rows, seed=1, round_=round_, on_step=lambda *_: None)
    assert rates.found[:STEPS] == rates.found[STEPS:]


class Stop(Observer):
    """Interrupts a run when its second round is durable."""

    def finished_round(self, record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt


def oracle(counts: dict[str, int], records: list[dict], rate: float) -> list[float]:
    """By step of the run: a line from 0 up to the rate over a fifth of all steps, and down to 0."""
    found = []
    for record in records:
        for client in record["clients"]:
            steps = math.ceil(counts[client["client"]] / 8)
            whole = len(records) * steps
            warm = math.ceil(0.2 * whole)
            for k in range((record["round"] - 1) * steps, record["round"] * steps):
                share = k / warm if k < warm else (whole - k) / (whole - warm)
                found.append(rate * share)
    return found


def test_rounds_count_for_a_client_that_was_not_drawn_and_resuming_changes_nothing(
    document, tmp_path, rates
):
    """Rates and bits of a run that was stopped in the middle of it, with two of three clients."""
    document["training"] |= {"schedule": "run", "warmup_steps": 0.2}
    document["federation"] |= {"rounds": 4, "clients_per_round": 2}
    recipe = parse_recipe(document, "test")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(recipe, whole)
    (_, *told), rates.found = rates.found, []  # the first step is the rehearsal's
    with pytest.raises(KeyboardInterrupt):
        run(recipe, stopped, observer=Stop())
    (_, *before), rates.found = rates.found, []
    run(recipe, stopped, resume=True)
    (_, *after) = rates.found
    assert [*before, *after] == told
    assert records_without_times(stopped) == records_without_times(whole)
    assert files(stopped / "adapter") == files(whole / "adapter")
    counts = json.loads((whole / "run.json").read_text())["clients"]
    wanted = oracle(counts, records_without_times(whole), rate=3e-2)
    assert [rate for rate, *_ in told] == pytest.approx(wanted)


def test_a_run_of_one_schedule_has_as_many_rounds_as_it_was_begun_with(document, tmp_path):
    document["training"] |= {"schedule": "run"}
    document["federation"]["rounds"] = 1
    run(parse_recipe(document, "test"), tmp_path / "run")
    assert 'schedule = "run"' in (tmp_path / "run" / "recipe.toml").read_text()
    document["federation"]["rounds"] = 2
    with pytest.raises(ResumeError, match="federation.rounds: 1 there, 2 here") as refused:
        run(parse_recipe(document, "test"), tmp_path / "run", resume=True)
    assert "one schedule over all rounds" in str(refused.value)
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "inverse_sqrt"])
def test_schedules_that_are_a_function_of_the_step_are_taken(kind):
    assert training_faults({"use_cpu": True, "schedule": "run", "lr_scheduler_type": kind}) == []
