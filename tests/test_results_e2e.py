"""Rows and base of the E2E results: what is learned beforehand, by clients, and scored is apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.results.cell import ROOT, Folders
from benchmarks.results.e2e import METRICS, SEEDS, cells, prepare, tables
from benchmarks.results.e2e_base import (
    KIND,
    PROMPT,
    REFERENCE,
    BaseRecipe,
    prepare_base,
    prepare_rows,
)

from fedexlora.rounds.recipe import load_recipe

TINY = BaseRecipe(vocabulary=300, width=8, layers=1, heads=1, positions=128, rows=8, batch=4)
KINDS = (None, "pub", "coffee shop")


def restaurants(count, first):
    for i in range(first, first + count):
        kind = KINDS[i % 3] or (None if first == 0 else "restaurant")
        prompt = f"name[Place {i}]" + (f", eatType[{kind}]" if kind else "")
        for text in (f"Place {i} is a {kind}.", f"A {kind} is Place {i}."):
            yield {PROMPT: prompt, REFERENCE: text}


@pytest.fixture
def folders(tmp_path):
    source = tmp_path / "data" / "e2e_nlg"
    source.mkdir(parents=True)
    for name, count, first in (("train", 20, 0), ("test", 9, 20)):
        lines = [json.dumps(row) for row in restaurants(count, first)]
        (source / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return Folders(tmp_path / "data", tmp_path / "work", tmp_path / "records")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_base_s_half_names_no_kind_of_place_and_the_clients_does(folders):
    rows = prepare_rows(folders.data, folders.work, None)
    base, train = (read(rows / f"{name}.jsonl") for name in ("base", "train"))
    assert len(base) == 14
    assert all(row[KIND] is None and KIND not in row[PROMPT] for row in base)
    assert len(train) == 26
    assert all(f"eatType[{row[KIND]}]" in row[PROMPT] for row in train)


def test_scored_meaning_representations_keep_all_references(folders):
    rows = read(prepare_rows(folders.data, folders.work, 4) / "test.jsonl")
    assert len({row[PROMPT] for row in rows}) == 4
    assert len(rows) == 8


def test_a_base_is_made_once_and_reads_back(folders):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = prepare_rows(folders.data, folders.work, None)
    folder = prepare_base(rows, folders.work, TINY)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_base(rows, folders.work, TINY) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Café £20-25")["input_ids"]) == "Café £20-25"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size


def test_cells_read_what_is_prepared(folders, monkeypatch):
    monkeypatch.setattr("benchmarks.results.e2e.FULL", TINY)
    prepare(folders, smoke=False)
    found = cells(smoke=False)
    assert len(found) == 7 * len(SEEDS)
    for cell in found:
        settings = [text.format(data=folders.data, work=folders.work) for text in cell.settings]
        recipe = load_recipe(ROOT / f"recipes/{cell.recipe}.toml", settings)
        assert Path(recipe.data.source, "test.jsonl").is_file()
        assert Path(recipe.model.source, "config.json").is_file()
        assert recipe.task.generation.metrics == tuple(METRICS)
        assert (recipe.partition.kind == "by_column") == (cell.key["rows"] == "by kind")
        assert recipe.federation.rounds == recipe.evaluation.every


def record(key, bleu):
    metrics = {name: bleu if name == "e2e_bleu" else 1.0 for name in METRICS}
    return {
        "key": key,
        "initial_metrics": dict.fromkeys(METRICS, 0.5),
        "metrics": metrics,
        "deviation": [0.25, 0.125, 0.0],
    }


def test_tables_pair_runs_by_seed():
    points = {"centralised": 4.0, "FedEx-LoRA": 3.0, "FedIT": 1.0, "FFA-LoRA": 2.0}
    records = [
        record(dict(cell.key), points[cell.key["method"]] + 10 * cell.key["seed"])
        for cell in cells(smoke=False)
    ]
    made = tables(records)
    gains = {row.split(" | ")[0]: row.split(" | ")[1] for row in made["e2e-gains"].splitlines()[2:]}
    assert gains["| IID: FedEx-LoRA - FedIT"] == "+2.00 ± 0.00 (3 of 3)"
    assert gains["| by kind: FedIT - FFA-LoRA"] == "-1.00 ± 0.00 (0 of 3)"
    assert "| centralised, all rows | 14.00 ± 10.00 |" in made["e2e"]
    assert made["e2e"].splitlines()[2].startswith("| base, before round 1 | 0.50 |")
    assert made["e2e-deviation"].splitlines()[2] == (
        "| IID | 25.0 ± 0.0 | 12.5 ± 0.0 | 0.0 ± 0.0 |"
    )
