"""``fedexlora check``: what it says, and refuses as ``run`` does; it writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tomlkit

from fedexlora.exchange.forecast_records import ForecastRecord
from fedexlora.methods import METHODS
from fedexlora.rounds.forecast import forecast
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.recipe import load_recipe
from fedexlora.rounds.run import run
from tests.cli.invoke import fedexlora
from tests.rounds.conftest import data_folder, document  # noqa: F401 - fixtures


@pytest.fixture
def recipe_file(document, tmp_path):  # noqa: F811
    path = tmp_path / "recipe.toml"
    path.write_text(tomlkit.dumps(document))
    return path


def test_it_says_what_a_run_then_is_and_writes_nothing(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = fedexlora("check", recipe_file, "--json")
    assert done.returncode == 0, done.stderr
    found = ForecastRecord.model_validate_json(done.stdout)
    assert not list(Path.cwd().iterdir())
    out = tmp_path / "run"
    assert fedexlora("run", recipe_file, "--out", out).returncode == 0
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert found.round_up == pytest.approx([r["bytes"]["up"] for r in records], rel=0.01)
    assert found.round_down == pytest.approx([r["bytes"]["down"] for r in records], rel=0.05)
    files = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert files / 3 < found.disk < 3 * files  # of tensors of a few numbers, most is their names


@pytest.mark.parametrize(
    "change",
    [
        "federation.roundz=3",
        "lora.target_modules=['q_proj']",
        "task.label=topic",
        "partition.column=where",
        "model.source=./none",
        "lora.use_dora=true",
        "federation.allow=['nobody']",
        "training.learning_rate=-1",
    ],
)
def test_it_has_the_faults_of_run_word_for_word(recipe_file, tmp_path, change):
    checked = fedexlora("check", recipe_file, "--set", change)
    run = fedexlora("run", recipe_file, "--set", change, "--out", tmp_path / "run")
    said = [done.stderr[done.stderr.index("error ") :] for done in (checked, run)]
    assert said[0] == said[1]
    assert checked.returncode == run.returncode == 2


@pytest.mark.parametrize("columns", [60, 120])
def test_without_weights_it_says_so_and_reckons_the_same(document, tmp_path, columns):  # noqa: F811
    whole = tmp_path / "recipe.toml"
    whole.write_text(tomlkit.dumps(document))
    base = tmp_path / "base"
    shutil.copytree(document["model"]["source"], base)
    (base / "model.safetensors").unlink()
    bare = tmp_path / "bare.toml"
    bare.write_text(tomlkit.dumps({**document, "model": {"source": str(base)}}))
    shown = fedexlora("check", bare, columns=columns)
    assert shown.returncode == 0, shown.stderr
    assert "not rehearsed" in shown.stdout
    assert "…" not in shown.stdout
    one, other = (
        ForecastRecord.model_validate_json(fedexlora("check", path, "--json").stdout)
        for path in (whole, bare)
    )
    assert (one.rehearsed, other.rehearsed) == (True, False)
    assert (one.modules, one.round_down) == (other.modules, other.round_down)
    assert one.trained_parameters == other.trained_parameters


@pytest.mark.parametrize(
    ("change", "placement", "reason"),
    [
        ("model.dtype=bfloat16", "side", "the weight is bfloat16"),
        ("federation.placement=side", "side", "federation.placement = 'side'"),
        ("federation.rounds=3", "fold", "a float32 weight of its own"),
    ],
)
def test_where_remainders_live_and_why(recipe_file, change, placement, reason):
    done = fedexlora("check", recipe_file, "--set", change, "--json")
    found = ForecastRecord.model_validate_json(done.stdout)
    assert {kind.placement for kind in found.modules} == {placement}
    assert all(reason in kind.reason for kind in found.modules)


def of_method(name: str) -> list[str]:
    start = METHODS[name].default.start
    return [f"method.name={name}", *([f"lora.init_lora_weights={start[0]}"] if start else [])]


@pytest.mark.parametrize(
    "changes",
    [
        *(of_method(name) for name in METHODS if name != "fedex"),
        ["method.name=hetlora", "clients.site-north.lora.r=1"],
        ["method.name=fedmomentum", "method.energy=1.0"],
        ["method.next_adapter=keep"],
        ["method.next_adapter=svd"],
        ["method.next_adapter=reinit"],
        ["method.remainder_rank=1"],
        ["method.remainder_energy=0.5"],
        ["federation.clients_per_round=2", "federation.history=1", "federation.rounds=5"],
        ["clients.site-north.lora.r=1", "clients.site-west.lora.r=3"],
    ],
    ids=" ".join,
)
def test_the_bytes_of_every_method_and_draw(document, tmp_path, changes):  # noqa: F811
    path = tmp_path / "recipe.toml"
    path.write_text(tomlkit.dumps(document))
    recipe = load_recipe(path, changes)
    found = forecast(recipe, "", Observer())
    records = run(recipe, tmp_path / "run").records
    # Numbers in headers have more or fewer digits.
    assert found.round_up == pytest.approx([r.bytes.up for r in records], rel=0.02, abs=64)
    for most, record in zip(found.round_down, records, strict=True):
        if found.exact:
            assert 0.98 * record.bytes.down <= most <= 1.05 * record.bytes.down
        else:  # a share of energy decides on ranks
            assert most == pytest.approx(record.bytes.down, rel=0.3)
