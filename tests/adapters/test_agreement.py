"""Adapters that mean the same are taken, by whatever names; real differences have a way round."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from fedexlora import aggregate_adapters, deviation, merge_adapter
from fedexlora.adapters import aggregate
from fedexlora.errors import AdapterError
from fedexlora.methods import METHODS
from fedexlora.methods.method import Method
from tests.adapters.folders import ideal, store, store_all, updates
from tests.adapters.test_foreign_names import START, rekey
from tests.adapters.test_refusals import change_config
from tests.cli.invoke import fedexlora
from tests.models import EVERY, base_of, lora_layers


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_what_one_adapter_leaves_out_another_says(tmp_path):
    """Unsloth stores the class of the model for its task, and a regular expression of layers."""
    folders = store_all(tmp_path, "llama-rslora", ({}, {"r": 3}, {}))
    noted = {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}
    change_config(folders[0], task_type=None, auto_mapping=noted, revision="main")
    change_config(folders[1], task_type=None, auto_mapping=None, base_model_name_or_path=None)
    aggregate_adapters(folders, tmp_path / "mean", weights=[1, 2, 5])
    config = json.loads((tmp_path / "mean" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "base")
    found = updates("llama-rslora", tmp_path / "mean")
    for name, wanted in ideal("llama-rslora", folders, [1, 2, 5]).items():
        assert error(found[name], wanted) < 1e-6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("org/Model", "Org/model"),
        ("./local", "local/"),
        ("org/model", "/cache/models--org--model/snapshots/0123abcd"),
    ],
)
def test_one_base_by_two_names(tmp_path, one, other):
    folders = store_all(tmp_path, "roberta-biases", ({}, {}))
    change_config(folders[0], base_model_name_or_path=one)
    change_config(folders[1], base_model_name_or_path=other)
    assert aggregate_adapters(folders, tmp_path / "mean").base == one


def test_real_differences_are_refused_with_options_that_exist(tmp_path):
    folders = store_all(tmp_path, "roberta-biases", ({}, {}))
    change_config(folders[1], task_type="TOKEN_CLS", base_model_name_or_path="a/b")
    done = fedexlora("aggregate", *folders, "--out", tmp_path / "mean")
    said = " ".join(done.stderr.split())
    assert done.returncode == 2
    assert "say so by --task NAME" in said
    assert "say so by --base NAME" in said
    words = ("--task", "SEQ_CLS", "--base", "org/base")
    assert fedexlora("deviation", *folders, *words).returncode == 0
    assert fedexlora("aggregate", *folders, "--out", tmp_path / "mean", *words).returncode == 0


def test_a_missing_layer_is_no_advice_where_the_layers_are_others(tmp_path):
    folders = [
        store(tmp_path / part, "roberta-biases", seed=i, bias="none", target_modules=[part])
        for i, part in enumerate(["query", "value"])
    ]
    with pytest.raises(AdapterError) as caught:
        aggregate_adapters(folders, tmp_path / "mean")
    assert "not adapted, but by others" in str(caught.value)
    assert "--allow-missing" not in str(caught.value)


def llava():
    text = LlamaConfig(
        vocab_size=90,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=80)
    return LlavaForConditionalGeneration(config)


EVERY["llava"] = (
    llava,
    {"task_type": "CAUSAL_LM", "target_modules": r".*language_model.*\.(q_proj|v_proj)"}
    | {"r": 3, "lora_alpha": 7},
)


def old(key):
    """The name that transformers 4 had."""
    return key.replace(f"{START}model.language_model.", f"{START}language_model.model.")


@pytest.fixture
def renamed(tmp_path):
    """Three adapters of a model of pictures and texts, the second with names of transformers 4."""
    folders = store_all(tmp_path, "llava", ({}, {"r": 2}, {}))
    wanted = ideal("llava", folders, [1, 2, 5])
    rekey(folders[1], old)
    return folders, wanted


@pytest.mark.parametrize("allow_missing", [False, True])
def test_layers_by_the_names_of_two_versions_are_refused_by_name(tmp_path, renamed, allow_missing):
    with pytest.raises(AdapterError) as caught:
        aggregate_adapters(renamed[0], tmp_path / "mean", allow_missing=allow_missing)
    (line,) = [fault for fault in caught.value.faults if "site-2" in fault]
    assert "calls language_model.model.layers.0.self_attn.q_proj what others call" in line
    assert "--base FOLDER" in line
    assert "--allow-missing" not in str(caught.value)
    assert not (tmp_path / "mean").exists()


def test_the_base_brings_them_together(tmp_path, renamed):
    folders, wanted = renamed
    base_of("llava").save_pretrained(tmp_path / "files")
    base = str(tmp_path / "files")
    done = aggregate_adapters(folders, tmp_path / "mean", weights=[1, 2, 5], base=base)
    assert done.matched_with == "LlavaForConditionalGeneration"
    assert "in 4 names of layers" in done.sources[1].names[-1]
    found = updates("llava", tmp_path / "mean")
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        assert error(found[name], update) < 1e-6
    assert deviation(folders, [1, 2, 5], base=base).deviation > 0.1
    merge_adapter(tmp_path / "mean", base, tmp_path / "merged")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    for name, layer in lora_layers(PeftModel.from_pretrained(base_of("llava"), tmp_path / "mean")):
        torch.testing.assert_close(
            merged[f"{name}.weight"], layer.get_base_layer().weight + wanted[name].float()
        )


def test_layers_that_the_base_lacks_are_refused(tmp_path):
    folders = store_all(tmp_path, "llama-rslora", ({}, {}))
    base_of("llama-rslora").save_pretrained(tmp_path / "files")
    for folder in folders:
        rekey(folder, lambda key: key.replace("layers.1.", "layers.7."))
    aggregate_adapters(folders, tmp_path / "unknown")
    with pytest.raises(AdapterError, match=r"layers\.7.* are none of LlamaForCausalLM's"):
        aggregate_adapters(folders, tmp_path / "mean", base=str(tmp_path / "files"))
    assert not (tmp_path / "mean").exists()


def test_a_head_that_peft_would_ignore_is_refused(tmp_path):
    folders = store_all(tmp_path, "llama-rslora", ({}, {}))
    base_of("llama-rslora").save_pretrained(tmp_path / "files")
    for folder in folders:
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path) | {f"{START}score.weight": torch.ones(3, 24)}, path)
    with pytest.raises(AdapterError, match=r"PEFT would ignore base_model\.model\.score\.weight"):
        aggregate_adapters(folders, tmp_path / "mean", base=str(tmp_path / "files"))


def test_an_adapter_that_was_never_trained_and_one_that_counts_twice_are_said(tmp_path):
    folders = store_all(tmp_path, "roberta-biases", ({}, {}, {}))
    path = folders[1] / "adapter_model.safetensors"
    save_file(
        {k: torch.zeros_like(x) if "lora_B" in k else x for k, x in load_file(path).items()}, path
    )
    shutil.copytree(folders[0], tmp_path / "again")
    given = [*folders, tmp_path / "again", folders[2]]
    done = fedexlora("aggregate", *given, "--out", tmp_path / "mean")
    assert "every update is zero" in done.stdout
    assert done.stdout.count("which so counts twice") == 2
    record = json.loads((tmp_path / "mean" / "aggregation.json").read_text())
    assert [source["zero"] for source in record["sources"]] == [False, True, False, False, False]
    first, third = str(folders[0]), str(folders[2])
    assert [s["same_as"] for s in record["sources"]] == [None, None, None, first, third]
    assert fedexlora("deviation", *given).stdout.count("every update is zero") == 1


def row(factors: tuple[str, ...] = ("A", "B"), **changes) -> Method:
    """A made-up row of the table, of a method that trains these factors."""
    rule = replace(METHODS["fedex"].default, halves=(factors,))
    changes["rule"] = lambda options: rule
    fields = {name: getattr(METHODS["fedex"], name) for name in Method.__dataclass_fields__}
    return Method(**{**fields, "name": "made-up", **changes})


@pytest.mark.parametrize(
    ("factors", "stored", "exact"),
    [
        (("A", "B"), "factors", False),
        (("A", "B"), "products", True),
        (("A",), "products", True),
    ],
)
def test_a_method_says_itself_what_it_makes_of_stored_adapters(
    tmp_path, monkeypatch, factors, stored, exact
):
    monkeypatch.setattr(aggregate, "METHODS", {"made-up": row(factors, stored=stored)})
    folders = store_all(tmp_path, "roberta-biases", ({}, {"r": 3}, {}))
    done = aggregate_adapters(folders, tmp_path / "mean", weights=[1, 2, 5], method="made-up")
    found = updates("roberta-biases", tmp_path / "mean")
    errors = [error(found[n], u) for n, u in ideal("roberta-biases", folders, [1, 2, 5]).items()]
    assert (max(errors) < 1e-6) == exact
    assert done.lossless == exact


def test_a_row_without_an_arithmetic_of_its_own_cannot_fall_through(tmp_path, monkeypatch):
    folders = store_all(tmp_path, "roberta-biases", ({}, {}))
    with pytest.raises(TypeError, match="stored"):
        Method(
            **{
                n: getattr(METHODS["fedex"], n)
                for n in Method.__dataclass_fields__
                if n != "stored"
            }
        )
    monkeypatch.setattr(aggregate, "METHODS", {"made-up": row(stored="none")})
    with pytest.raises(AdapterError, match="needs more than finished adapters"):
        aggregate_adapters(folders, tmp_path / "mean", method="made-up")
    monkeypatch.setattr(aggregate, "METHODS", {"made-up": row(stored="median")})
    with pytest.raises(AssertionError, match="no arithmetic is known for 'median'"):
        aggregate_adapters(folders, tmp_path / "mean", method="made-up")
    assert not (tmp_path / "mean").exists()


def test_a_body_without_its_head_has_other_names(tmp_path):
    """The same layers, of a model loaded without its head: no layer is missing."""
    folders = store_all(tmp_path, "roberta-biases", ({"bias": "none"}, {"bias": "none"}))
    rekey(folders[1], lambda key: key.replace(f"{START}roberta.", START))
    with pytest.raises(AdapterError, match="of a model without its head"):
        aggregate_adapters(folders, tmp_path / "mean", allow_missing=True)
