"""The deviation of stored adapters against dense arithmetic, and how it is shown."""

from __future__ import annotations

import doctest
import json

import pytest
import torch
from safetensors.torch import load_file

from fedexlora import aggregate_adapters, deviation
from fedexlora.adapters import aggregate as aggregate_module
from fedexlora.adapters import deviation as deviation_module
from fedexlora.adapters import merge as merge_module
from fedexlora.exchange.adapter_records import DeviationModuleRecord, DeviationRecord
from fedexlora.report.heatmap import draw_deviation
from tests.adapters.folders import ideal, load, store_all
from tests.cli.invoke import fedexlora as run_command
from tests.models import base_of, lora_layers

WEIGHTS = [1, 2, 5]


def averaged(case, folders, weights):
    """The product of the mean factors, scaled, dense, in float64; same ranks and scalings only."""
    total = float(sum(weights))
    model = load(case, folders[0], torch.float64)
    sets = [load_file(f / "adapter_model.safetensors") for f in folders]
    found = {}
    for name, layer in lora_layers(model):
        prefix = f"base_model.model.{name}.lora"
        a, b = (
            sum(
                (w / total) * s[f"{prefix}_{x}.weight"].double()
                for s, w in zip(sets, weights, strict=True)
            )
            for x in "AB"
        )
        found[name] = layer.scaling["default"] * b @ a
    return found


def test_the_deviation_is_that_of_dense_matrices(tmp_path):
    folders = store_all(tmp_path, "llama-rslora", [{}, {}, {}])
    record = deviation(folders, WEIGHTS)
    wanted, mean = (
        ideal("llama-rslora", folders, WEIGHTS),
        averaged("llama-rslora", folders, WEIGHTS),
    )
    lost = total = 0.0
    for module in record.modules:
        ideal_norm = float(wanted[module.module].norm())
        off = float((wanted[module.module] - mean[module.module]).norm())
        assert module.ideal == pytest.approx(ideal_norm, rel=1e-9)
        assert module.deviation == pytest.approx(off / ideal_norm, rel=1e-9)
        lost, total = lost + off**2, total + ideal_norm**2
    assert record.deviation == pytest.approx((lost / total) ** 0.5, rel=1e-9)
    assert {m.layer for m in record.modules} == {"model.layers.0", "model.layers.1"}


def test_equal_adapters_lose_nothing(tmp_path):
    folder = store_all(tmp_path, "roberta", [{}])[0]
    assert deviation([folder, folder]).deviation == pytest.approx(0, abs=1e-12)


def test_mixed_ranks_and_missing_modules_agree_with_the_aggregate(tmp_path):
    variants = [{"r": 3}, {"r": 6, "lora_alpha": 2}, {"target_modules": ["query"]}]
    folders = store_all(tmp_path, "roberta", variants)
    record = deviation(folders, WEIGHTS, allow_missing=True)
    mean = aggregate_adapters(
        folders, tmp_path / "mean", weights=WEIGHTS, method="fedit", allow_missing=True
    )
    assert record.deviation == pytest.approx(mean.error, rel=1e-5)


def test_the_table_the_json_and_the_picture(tmp_path):
    folders = store_all(tmp_path, "gpt2-patterns", [{}, {}, {}])
    picture = tmp_path / "map.png"
    done = run_command("deviation", *folders, "--weights", "1,2,5", "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert "transformer.h.0.attn.c_attn" in done.stdout
    assert "█" in done.stdout
    assert "of their mean update" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    done = run_command("deviation", *folders, "--weights", "1,2,5", "--json")
    record = json.loads(done.stdout)
    assert len(record["modules"]) == 8
    assert record["sources"][2]["weight"] == 0.625


@pytest.mark.parametrize(
    "module", [aggregate_module, deviation_module, merge_module], ids=lambda m: m.__name__
)
def test_the_examples_in_docstrings(tmp_path, monkeypatch, module):
    store_all(tmp_path, "roberta", [{"r": 4}] * 3)
    monkeypatch.chdir(tmp_path)
    if module is merge_module:
        base_of("roberta").save_pretrained("base")
        aggregate_adapters(["site-1", "site-2", "site-3"], "mean")
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


def test_a_name_with_a_dollar_is_drawn_as_it_is(tmp_path):
    """It is a name out of somebody's file: as a formula it would not even parse."""
    parts = {"residual": 1.0, "ideal": 2.0, "deviation": 0.5}
    module = DeviationModuleRecord(module="a", layer=r"$\frac{$", projection=r"q$\x$", **parts)
    record = DeviationRecord(sources=(), base="b", deviation=0.5, modules=(module,))
    draw_deviation(record, tmp_path / "map.svg")
    assert (tmp_path / "map.svg").stat().st_size > 0
