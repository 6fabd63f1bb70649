"""What is refused, with the reason; and that what is read is what PEFT applies."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedexlora.errors import BridgeError
from fedexlora.peft_bridge.load import attach_lora, load_base, lora_faults, resolve_source
from fedexlora.peft_bridge.model import AdaptedModel
from tests.models import CASES, adapted, gpt2, llama, lora_layers, roberta


@pytest.mark.parametrize("case", CASES)
def test_every_lora_layer_is_found_with_peft_s_scaling_and_orientation(case):
    model = adapted(case)
    layers = dict(lora_layers(model))
    for layer in layers.values():
        nn.init.normal_(layer.lora_B["default"].weight)
    found = AdaptedModel(model).modules
    assert found.keys() == layers.keys()
    for name, module in found.items():
        product = module.scaling * (module.B @ module.A)
        delta = layers[name].get_delta_weight("default")
        assert module.as_stored(product).shape == module.weight.shape
        torch.testing.assert_close(module.as_stored(product), delta)


def test_patterns_and_rslora_give_each_module_its_own_scaling():
    scalings = {
        case: {round(m.scaling, 4) for m in AdaptedModel(adapted(case)).modules.values()}
        for case in ("llama-rslora", "gpt2-patterns")
    }
    assert scalings["llama-rslora"] == {round(10 / 2, 4), round(10 / 2**0.5, 4)}
    assert scalings["gpt2-patterns"] == {1.5, 3.0, 0.25, 1.6}


def test_heads_and_biases_are_named_as_in_the_base_model():
    heads = AdaptedModel(adapted("roberta")).spec.dense
    assert set(heads) == {
        f"classifier.{layer}.{kind}"
        for layer in ("dense", "out_proj")
        for kind in ("weight", "bias")
    }
    biases = AdaptedModel(adapted("roberta-biases")).spec.dense
    assert "roberta.encoder.layer.0.attention.self.query.bias" in biases
    assert all(name in dict(roberta().named_parameters()) for name in (*heads, *biases))


def test_frozen_factors_are_not_trained():
    model = AdaptedModel(adapted("roberta"), trained=("B",))
    trained = [n for n, p in model.peft_model.named_parameters() if p.requires_grad]
    assert not any("lora_A" in name for name in trained)
    assert any("lora_B" in name for name in trained)
    assert not any(name.startswith("A/") for name in model.update_tensors())


REFUSED = {
    "dora": (roberta, {"target_modules": ["query"], "use_dora": True}, "Dora is not a plain"),
    "pissa": (roberta, {"target_modules": ["query"], "init_lora_weights": "pissa"}, "'pissa'"),
    "olora": (roberta, {"target_modules": ["query"], "init_lora_weights": "olora"}, "'olora'"),
    "lora_bias": (roberta, {"target_modules": ["query"], "lora_bias": True}, "lora_bias"),
    "embedding": (
        roberta,
        {"target_modules": ["word_embeddings"]},
        "embeddings.word_embeddings: layer type Embedding is not supported",
    ),
    "tied": (gpt2, {"target_modules": ["lm_head"]}, "lm_head: its weight is tied"),
    "tokens": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        "trainable_token_indices",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_not_be_exact_is_refused_with_the_reason(kind):
    build, options, message = REFUSED[kind]
    model = get_peft_model(build(), LoraConfig(**options))
    with pytest.raises(BridgeError, match="cannot be aggregated exactly") as caught:
        AdaptedModel(model)
    assert message in str(caught.value)


def test_a_low_precision_base_is_refused_module_by_module():
    model = get_peft_model(roberta().bfloat16(), LoraConfig(target_modules=["query", "value"], r=2))
    with pytest.raises(BridgeError, match="bfloat16") as caught:
        AdaptedModel(model)
    assert len(caught.value.faults) == 4


def test_modules_that_do_not_exist_are_all_named_with_those_that_do():
    options = {
        "target_modules": ["query", "q_proj"],
        "modules_to_save": ["score"],
        "rank_pattern": {"layer.7.attention.self.query": 2},
    }
    with pytest.raises(BridgeError, match="does not fit the model") as caught:
        attach_lora(roberta(), options, "SEQ_CLS", 0)
    assert caught.value.faults == (
        "lora.target_modules: no module of this model is named 'q_proj'",
        "lora.modules_to_save: no module of this model is named 'score'",
        "lora.rank_pattern: 'layer.7.attention.self.query' matches no module of this model",
        "layers that can be adapted: dense, key, out_proj, query, value",
    )
    with pytest.raises(BridgeError, match=r"lora.target_modules = 'xyz\.\*'"):
        attach_lora(roberta(), {"target_modules": "xyz.*"}, "SEQ_CLS", 0)


def test_unknown_keys_of_the_lora_table_are_named_with_the_nearest():
    faults = lora_faults({"rank": 4, "lora_alhpa": 3, "task_type": "SEQ_CLS"})
    assert len(faults) == 3
    assert "did you mean 'lora_alpha'" in faults[1]
    assert "follows from task.kind" in faults[2]
    assert lora_faults({"r": 0, "target_modules": ["query"]}) == []
    assert lora_faults({"r": 4, "lora_alpha": 8}) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no_such_package_x/model", "no package 'no_such_package_x'"),
        ("package:fedexlora/nothing", "there is no folder"),
        ("./not/here", "there is no folder"),
    ],
)
def test_a_model_that_is_not_there_is_named(source, message):
    with pytest.raises(BridgeError, match=message):
        resolve_source(source)


def test_sources_resolve_to_folders_or_stay_hub_names():
    assert resolve_source("package:fedexlora/algebra").endswith("algebra")
    assert resolve_source("org/name") == "org/name"


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(BridgeError, match="cannot be loaded"):
        load_base(str(tmp_path), None, "SEQ_CLS", {}, 0)
