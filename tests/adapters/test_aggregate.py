"""The mean of stored adapters against a naive float64 sum of what PEFT applies."""

from __future__ import annotations

import json

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from fedexlora import aggregate_adapters, compress_adapter
from tests.adapters.folders import ideal, load, store, store_all, updates
from tests.models import base_of, inputs, logits, lora_layers

MIXED = ({"r": 3, "lora_alpha": 7}, {"r": 8, "lora_alpha": 4}, {"r": 5, "lora_alpha": 20})
SAME = ({}, {}, {})
WEIGHTS = [1, 2, 5]
KINDS = {
    "heads": ("roberta", SAME),
    "mixed ranks": ("roberta", MIXED),
    "rslora and patterns": ("llama-rslora", SAME),
    "rslora and plain": (
        "llama-rslora",
        ({}, {"use_rslora": False, "rank_pattern": {}}, {"alpha_pattern": {"k_proj": 3}, "r": 6}),
    ),
    "Conv1D with patterns": ("gpt2-patterns", SAME),
    "Conv1D, mixed": ("gpt2-patterns", ({}, {"rank_pattern": {"c_fc": 7}}, {"r": 1})),
    "Embedding and lm_head": ("embedding", ({}, {"r": 6}, {"lora_alpha": 1})),
    "biases": ("roberta-biases", SAME),
    "factor biases": ("factor-biases", ({}, {"r": 5}, {"use_rslora": False})),
    "convolution": ("patches", ({}, {"r": 7}, {})),
    "token rows": ("tokens", SAME),
}


def share(error, whole):
    return float(error.norm() / whole.norm())


def check(case, out, folders, weights, limit=1e-6):
    wanted = ideal(case, folders, weights)
    found = updates(case, out)
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        assert share(found[name] - update, update) <= limit, name


def merged_logits(case, folders, weights):
    """What a base says whose weights are W0 + the ideal, with the mean heads and biases."""
    model = load(case, folders[0], torch.float64)
    sets = [load_file(f / "adapter_model.safetensors") for f in folders]
    scalings = [
        {f"{name}.lora_B.bias": layer.scaling["default"] for name, layer in lora_layers(m)}
        for m in (load(case, f) for f in folders)
    ]
    total = float(sum(weights))
    state = {key: tensor.double() for key, tensor in sets[0].items()}
    for key in state:
        name = key.removeprefix("base_model.model.")
        if "lora_" in key and not key.endswith("lora_B.bias"):
            continue
        state[key] = sum(
            (w / total) * s[key].double() * scale.get(name, 1.0)
            for s, w, scale in zip(sets, weights, scalings, strict=True)
        ) / scalings[0].get(name, 1.0)
    set_peft_model_state_dict(model, state)
    wanted = ideal(case, folders, weights)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            first = layer.get_delta_weight("default")
            layer.get_base_layer().weight += wanted[name] - first
    with torch.inference_mode():
        fed = {k: v.double() if v.is_floating_point() else v for k, v in inputs(model).items()}
        return model.eval()(**fed).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_the_weighted_mean_update(tmp_path, kind):
    case, variants = KINDS[kind]
    folders = store_all(tmp_path, case, variants)
    out = tmp_path / "mean"
    done = aggregate_adapters(folders, out, weights=WEIGHTS)
    check(case, out, folders, WEIGHTS)
    assert done.lossless
    assert done == type(done).model_validate_json((out / "aggregation.json").read_text())
    expected = merged_logits(case, folders, WEIGHTS)
    torch.testing.assert_close(logits(load(case, out)).double(), expected, rtol=1e-4, atol=1e-4)


def test_files_in_bfloat16_are_not_rounded_again(tmp_path):
    folders = store_all(tmp_path, "roberta", MIXED, dtype=torch.bfloat16)
    stored = load_file(folders[0] / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    aggregate_adapters(folders, tmp_path / "mean", weights=WEIGHTS)
    check("roberta", tmp_path / "mean", folders, WEIGHTS)


def test_fifty_adapters_at_the_lowest_rank_that_loses_nothing(tmp_path):
    folders = store_all(tmp_path, "llama-rslora", [{}] * 50)
    weights = [1 + i % 7 for i in range(50)]
    done = aggregate_adapters(folders, tmp_path / "mean", weights=weights)
    check("llama-rslora", tmp_path / "mean", folders, weights)
    # Fifty times rank 4 is far more than a 12 by 24 layer can have.
    assert {m.module.split(".")[-1]: m.rank for m in done.modules} == {
        "q_proj": 24,
        "k_proj": 12,
        "v_proj": 12,
        "down_proj": 24,
    }


def test_one_adapter_and_copies_of_it_keep_its_rank(tmp_path):
    folder = store(tmp_path / "a", "roberta", seed=1)
    done = aggregate_adapters([folder] * 3, tmp_path / "mean", weights=WEIGHTS)
    assert {m.rank for m in done.modules} == {3}
    check("roberta", tmp_path / "mean", [folder], [1])


def test_the_scaling_is_one_also_for_servers_that_know_no_patterns(tmp_path):
    folders = store_all(tmp_path, "llama-rslora", SAME)
    aggregate_adapters(folders, tmp_path / "mean")
    config = json.loads((tmp_path / "mean" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 12
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert not config["use_rslora"]


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_a_rank_is_cut_optimally(tmp_path, rank):
    """Against torch.linalg.svd of the dense ideal in float64 (Eckart-Young)."""
    folders = store_all(tmp_path, "gpt2-patterns", SAME)
    done = aggregate_adapters(folders, tmp_path / "cut", weights=WEIGHTS, rank=rank)
    found = updates("gpt2-patterns", tmp_path / "cut")
    lost = total = 0.0
    every = ideal("gpt2-patterns", folders, WEIGHTS)
    for module in done.modules:
        wanted = every[module.module]
        s = torch.linalg.svdvals(wanted)
        optimal = float(s[rank:].norm() / s.norm())
        assert share(found[module.module] - wanted, wanted) == pytest.approx(optimal, abs=1e-5)
        assert module.error == pytest.approx(optimal, abs=1e-9)
        assert module.rank == min(rank, 24)
        lost, total = lost + float(s[rank:].norm()) ** 2, total + float(s.norm()) ** 2
    assert done.error == pytest.approx((lost / total) ** 0.5, rel=1e-9)
    assert done.rank == rank


@pytest.mark.parametrize("tolerance", [0.02, 0.3, 0.7])
def test_a_tolerance_is_kept_with_the_lowest_rank(tmp_path, tolerance):
    folders = store_all(tmp_path, "roberta", MIXED)
    done = aggregate_adapters(folders, tmp_path / "cut", tolerance=tolerance)
    wanted = ideal("roberta", folders, [1, 1, 1])
    for module in done.modules:
        s = torch.linalg.svdvals(wanted[module.module])
        assert module.error <= tolerance
        assert float(s[module.rank - 1 :].norm() / s.norm()) > tolerance


def test_averaging_the_factors_says_how_far_off_it_is(tmp_path):
    folders = store_all(tmp_path, "roberta", MIXED)
    done = aggregate_adapters(folders, tmp_path / "mean", weights=WEIGHTS, method="fedit")
    wanted = ideal("roberta", folders, WEIGHTS)
    found = updates("roberta", tmp_path / "mean")
    for module in done.modules:
        update = wanted[module.module]
        assert module.error == pytest.approx(share(found[module.module] - update, update), rel=1e-5)
        assert module.error > 0.1
    assert not done.lossless


def test_compressing_one_adapter(tmp_path):
    folder = store(tmp_path / "a", "roberta", seed=1)
    done = compress_adapter(folder, tmp_path / "small", rank=2)
    assert done.rank == 2
    assert 0.05 < done.error < 0.9


def test_a_missing_module_is_a_zero_update_if_that_is_asked_for(tmp_path):
    folders = [
        store(tmp_path / "a", "roberta-biases", seed=1, bias="none"),
        store(tmp_path / "b", "roberta-biases", seed=2, bias="none", target_modules=["query"]),
    ]
    done = aggregate_adapters(folders, tmp_path / "mean", weights=[1, 3], allow_missing=True)
    check("roberta-biases", tmp_path / "mean", folders, [1, 3])
    assert len(done.sources[1].missing) == 2
    assert all("value" in name for name in done.sources[1].missing)


def test_modules_that_no_adapter_has_all_of(tmp_path):
    folders = [
        store(tmp_path / part, "roberta-biases", seed=i, bias="none", target_modules=[part])
        for i, part in enumerate(["query", "value"])
    ]
    aggregate_adapters(folders, tmp_path / "mean", allow_missing=True)
    check("roberta-biases", tmp_path / "mean", folders, [1, 1])


def test_identical_copies_of_frozen_weights_keep_their_dtype(tmp_path):
    """PEFT stores the embedding beside its factors: it is the same in all adapters."""
    folders = []
    for i in range(2):
        folder = store(tmp_path / f"{i}", "embedding", seed=i)
        model = load("embedding", folder)
        model.save_pretrained(str(folder), save_embedding_layers=True)
        folders.append(folder)
    aggregate_adapters(folders, tmp_path / "mean", weights=[1, 3])
    before = load_file(folders[0] / "adapter_model.safetensors")
    after = load_file(tmp_path / "mean" / "adapter_model.safetensors")
    copies = [key for key in before if "lora_" not in key]
    assert copies
    for key in copies:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
    assert base_of("embedding").lm_head.weight.shape == (90, 24)
