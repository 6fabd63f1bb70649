"""The adapter that is written is the global model, on the untouched base, by PEFT's own loading."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import ExactnessError
from fedexlora.peft_bridge import global_writer
from fedexlora.peft_bridge.export import save_factors, save_global
from fedexlora.peft_bridge.model import AdaptedModel
from tests.models import CASES, adapted, base_of, live_update, logits, lora_layers
from tests.rounds.scripted import federation, run_round


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_the_loaded_adapter_is_the_global_model(case, rounds, tmp_path):
    model = AdaptedModel(adapted(case))
    parts, state = federation(model, "fedex")
    for _ in range(rounds):
        state, _ = run_round(parts, state)
    save_global(model, state, tmp_path)
    untouched = base_of(case)
    weights = {name: p.clone() for name, p in untouched.named_parameters()}
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    for name, layer in lora_layers(loaded):
        update = model.modules[name].stored_weight(live_update(model, name))
        found = layer.get_delta_weight("default").double()
        rounding = model.fold_rounding(name)
        assert float((found - update).norm()) <= 1e-6 * float(update.norm()) + rounding, name
        assert torch.equal(layer.base_layer.weight, weights[f"{name}.weight"])
    torch.testing.assert_close(logits(loaded), logits(model.peft_model), rtol=1e-4, atol=1e-5)
    before = logits(base_of(case))
    assert (logits(loaded) - before).norm() > 0.1 * before.norm(), "the update must matter"


def test_ranks_and_patterns_are_what_loses_nothing(tmp_path):
    model = AdaptedModel(adapted("llama-rslora"))
    parts, state = federation(model, "fedex")
    state, _ = run_round(parts, state)
    save_global(model, state, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert not config["use_rslora"]
    ranks = {
        n: layer.r["default"]
        for n, layer in lora_layers(PeftModel.from_pretrained(base_of("llama-rslora"), tmp_path))
    }
    # Three clients: the mean adapter and a residual of twice its rank; k_proj has 12 rows.
    assert ranks["model.layers.0.self_attn.q_proj"] == 3 * 4
    assert ranks["model.layers.1.self_attn.v_proj"] == 3 * 2
    assert ranks["model.layers.0.self_attn.k_proj"] == 12


def test_a_remainder_of_zero_writes_the_adapter_as_it_is(tmp_path):
    model = AdaptedModel(adapted("gpt2-patterns"))
    parts, state = federation(model, "fedit")
    state, _ = run_round(parts, state)
    save_global(model, state, tmp_path)
    loaded = PeftModel.from_pretrained(base_of("gpt2-patterns"), tmp_path)
    for name, layer in lora_layers(loaded):
        assert torch.equal(layer.lora_A["default"].weight, state.adapter[name].A)
        assert torch.equal(layer.lora_B["default"].weight, state.adapter[name].B)
        assert layer.scaling["default"] == model.modules[name].scaling


def test_a_module_without_any_update_still_loads(tmp_path):
    model = AdaptedModel(adapted("llama-rslora"))
    state = model.initial_state()
    name = next(iter(state.total))
    shape = state.total[name].shape
    total = state.total | {name: LowRank(torch.ones(shape, dtype=torch.float64))}
    model.apply(replace(state, total=total))
    save_global(model, replace(state, total=total), tmp_path)
    for other, layer in lora_layers(PeftModel.from_pretrained(base_of("llama-rslora"), tmp_path)):
        norm = layer.get_delta_weight("default").norm()
        assert (norm > 0) == (other == name)


@pytest.mark.parametrize("case", CASES)
def test_a_client_s_update_is_a_standard_adapter(case, tmp_path):
    model = AdaptedModel(adapted(case))
    state = model.initial_state()
    factors = {
        n: type(f)(torch.randn_like(f.A), torch.randn_like(f.B)) for n, f in state.adapter.items()
    }
    dense = {name: torch.randn_like(tensor) for name, tensor in state.dense.items()}
    save_factors(model, factors, dense, tmp_path)
    loaded = PeftModel.from_pretrained(base_of(case), tmp_path)
    for name, layer in lora_layers(loaded):
        assert torch.equal(layer.lora_A["default"].weight, factors[name].A)
    again = AdaptedModel(PeftModel.from_pretrained(base_of(case), tmp_path, is_trainable=True))
    for name, tensor in again.dense().items():
        assert torch.equal(tensor, dense[name])


@pytest.mark.parametrize("case", ["llama-rslora", "factor-biases"])
def test_one_module_or_head_that_is_written_a_little_wrong_is_named(case, tmp_path, monkeypatch):
    """Far less than a pooled error of all modules would show."""
    model = AdaptedModel(adapted(case))
    parts, state = federation(model, "fedex")
    state, _ = run_round(parts, state)
    (tmp_path / "right").mkdir()
    assert save_global(model, state, tmp_path / "right").error < 1e-6
    spoilt = min(load_file(tmp_path / "right" / "adapter_model.safetensors"))

    def wrong(tensors, path, **more):
        save_file({**tensors, spoilt: tensors[spoilt] * (1 + 3e-6)}, path, **more)

    monkeypatch.setattr(global_writer, "save_file", wrong)
    with pytest.raises(
        ExactnessError, match=r"off by [23]\.\d+e-06 of it, allowed 1.00e-06"
    ) as caught:
        save_global(model, state, tmp_path)
    assert len(caught.value.faults) == 1
    assert spoilt.removeprefix("base_model.model.").startswith(caught.value.faults[0].split(":")[0])


def test_the_benchmark_of_bfloat16_says_what_the_page_says(capsys, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.setattr("sys.argv", ["bf16_branch.py", "--width", "256"])
    runpy.run_path(str(root / "benchmarks" / "bf16_branch.py"), run_name="__main__")
    large, middle, small = (
        [float(x) for x in line.split()[1::2]] for line in capsys.readouterr().out.splitlines()[1:]
    )
    assert min(large) > 99
    assert min(middle) > 95
    assert max(small[:2]) < 50
    assert min(x[2] for x in (large, middle, small)) > 99.9


def test_the_start_of_a_run_whose_base_was_split_is_the_base_itself(tmp_path):
    """The factors of version 0 are what was taken out of the base: nothing is left of the two."""
    model = AdaptedModel(adapted("pissa"))
    written = save_global(model, model.initial_state(), tmp_path)
    assert written.error == 0.0
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name in model.modules:
        update = [tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA"]
        assert not (update[0] @ update[1]).any()
