"""``fedexlora compare``: cells, holes, statistics, and what is refused before anything runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import tomlkit

from fedexlora.exchange.comparison_records import ComparisonRecord
from fedexlora.report.arms import interval
from fedexlora.rounds import comparison
from fedexlora.rounds.comparison_plan import Arm, folder_name, parse_grid
from tests.cli.invoke import fedexlora
from tests.rounds.conftest import data_folder, document  # noqa: F401 - fixtures


@pytest.fixture
def recipe_file(document, tmp_path):  # noqa: F811
    path = tmp_path / "recipe.toml"
    path.write_text(tomlkit.dumps(document))
    return path


@pytest.fixture
def in_process(monkeypatch):
    """Cells in this process, as imports take far longer than they; returns the commands."""
    commands: list[list[str]] = []

    def run(command, *, stderr, **_):
        commands.append(command[3:])
        done = fedexlora(*command[3:])
        stderr.write(done.stderr.encode())
        return SimpleNamespace(returncode=done.returncode)

    monkeypatch.setattr(comparison.subprocess, "run", run)
    return commands


def read(out: Path) -> ComparisonRecord:
    return ComparisonRecord.model_validate_json((out / "compare.json").read_text())


def test_methods_by_seeds_are_ordinary_runs_and_their_statistics(recipe_file, in_process, tmp_path):
    out = tmp_path / "comparison"
    words = ["compare", recipe_file, "--methods", "fedit,fedex", "--seeds", "0,1,2", "--out", out]
    words += ["--set", "federation.rounds=2", "--target", "accuracy=0.01"]
    done = fedexlora(*words)
    assert done.returncode == 0, done.stderr
    found = read(out)
    assert len(in_process) == len(found.cells) == 6
    assert "the same rows, clients, order and initial adapter" in " ".join(done.stdout.split())
    assert all(seed.data and seed.adapter for seed in found.same_start)
    for cell in found.cells:
        lines = (out / cell.run / "rounds.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [point.round for point in cell.curve] == [0, 1, 2]
        assert cell.curve[-1].bytes.up == sum(record["bytes"]["up"] for record in records)
        assert cell.curve[-1].metrics == records[-1]["metrics"]
    last = {(c.method, c.seed): c.curve[-1].metrics["loss"] for c in found.cells}
    base, other = found.arms
    assert (found.baseline, base.differences) == ("fedit", {})
    scores = [last["fedex", seed] for seed in (0, 1, 2)]
    assert math.isclose(other.scores["loss"].mean, fmean(scores))
    assert math.isclose(other.scores["loss"].deviation, stdev(scores))
    paired = [last["fedex", seed] - last["fedit", seed] for seed in (0, 1, 2)]
    difference = other.differences["loss"]
    assert math.isclose(difference.mean, fmean(paired))
    assert min(paired) <= difference.low <= difference.mean <= difference.high <= max(paired)
    assert other.target.reached == 3
    assert found.budget == min(
        sum((c.curve[-1].bytes.up, c.curve[-1].bytes.down)) for c in found.cells
    )
    assert "loss" in found.lower_is_better
    again = fedexlora(*words, "--resume", "--json")
    assert again.returncode == 0
    assert len(in_process) == 6  # nothing was left to run
    assert ComparisonRecord.model_validate_json(again.stdout).cells == found.cells


def test_a_cell_that_fails_is_a_hole_that_resume_fills(
    recipe_file, in_process, tmp_path, monkeypatch
):
    out = tmp_path / "comparison"
    words = ["compare", recipe_file, "--methods", "fedex", "--seeds", "0", "--out", out]
    words += ["--set", "federation.rounds=1", "--grid", "training.learning_rate=1e-3,1e38"]
    done = fedexlora(*words)
    assert done.returncode == 1
    whole, failed = read(out).cells
    assert whole.hole is None
    assert "NoUpdatesError: round 1: no client delivered a usable update" in failed.hole
    assert [point.round for point in failed.curve] == [0]
    assert "fedex training.learning_rate=1e38, seed 0: NoUpdatesError" in done.stdout
    count = len(in_process)
    assert fedexlora(*words, "--resume").returncode == 1
    assert len(in_process) == count + 1  # the hole alone
    refused = fedexlora(*words)
    assert (refused.returncode, "is not empty" in refused.stderr) == (2, True)
    other = fedexlora(*words, "--resume", "--set", "lora.r=3")
    assert other.returncode == 2
    assert "lora.r" in other.stderr


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--methods", "fedx,ffa"], ["there is no 'fedx'; did you mean 'fedex'?"]),
        (["--methods", "fedex", "--seeds", "0,one"], ["found 'one'"]),
        (["--methods", "fedex", "--seeds", "1,1"], ["--seeds: 1 is there twice"]),
        (["--methods", "fedex", "--grid", "lora.r"], ["--grid lora.r: expected"]),
        (
            ["--methods", "fedex", "--grid", "federation.seed=1,2"],
            ["--grid federation.seed=1,2: give it by --seeds"],
        ),
        (
            ["--methods", "fedex,ffa", "--grid", "federation.roundz=1,2"],
            ["fedex federation.roundz=1", "ffa federation.roundz=2", "did you mean 'rounds'?"],
        ),
        (
            ["--methods", "fedex", "--baseline", "fedit"],
            ["--baseline fedit: expected one of fedex"],
        ),
        (["--methods", "fedex", "--target", "f1=0.5"], ["runs are compared by accuracy"]),
    ],
)
def test_what_cannot_be_compared_is_named_before_anything_runs(
    recipe_file, in_process, tmp_path, words, messages
):
    done = fedexlora("compare", recipe_file, "--out", tmp_path / "comparison", *words)
    assert done.returncode == 2
    for message in messages:
        assert message in done.stderr
    assert not in_process
    assert not (tmp_path / "comparison").exists()


def test_the_grid_is_split_at_commas_outside_of_brackets():
    found = parse_grid(['task.metrics=["f1","loss"],["loss"]', "lora.r=2, 4"])
    assert found == {"task.metrics": ['["f1","loss"]', '["loss"]'], "lora.r": ["2", "4"]}


def test_no_arm_leaves_its_folder():
    names = {
        folder_name(Arm("fedex", {"model.source": text})) for text in ("../x", "..%2Fx", "a b")
    }
    assert len(names) == 3
    assert not any("/" in name or " " in name for name in names)


def test_the_interval_is_the_same_every_time_and_widens_with_the_spread():
    near, far = interval([0.01, 0.02, 0.03]), interval([-0.1, 0.02, 0.2])
    assert near == interval([0.01, 0.02, 0.03])
    assert far[1] - far[0] > near[1] - near[0] > 0


def test_references_stand_beside_methods(recipe_file, in_process, tmp_path):
    out = tmp_path / "comparison"
    words = ["compare", recipe_file, "--methods", "fedex,centralised,local_only", "--seeds", "0"]
    done = fedexlora(*words, "--out", out, "--set", "federation.rounds=1")
    assert done.returncode == 0, done.stdout
    found = read(out)
    assert [cell.method for cell in found.cells] == ["fedex", "centralised", "local_only"]
    (start,) = found.same_start
    assert start.adapter
    assert start.differences == (
        "centralised: the division among clients differs from that of fedex",
    )
    records = [json.loads((out / cell.run / "rounds.jsonl").read_text()) for cell in found.cells]
    rows = [sum(client["num_examples"] for client in record["clients"]) for record in records]
    assert rows[0] == rows[1] == rows[2]
    assert [len(record["clients"]) for record in records] == [3, 1, 3]
    losses = [record["metrics"]["loss"] for record in records]
    assert len(set(losses)) == 3, "none is scored as another"
