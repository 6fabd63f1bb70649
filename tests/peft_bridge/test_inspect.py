"""What is refused, with the reason; and that what is read is what PEFT applies."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedexlora.errors import BridgeError
from fedexlora.peft_bridge.load import attach_lora, load_base, lora_faults
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.peft_bridge.source import resolve_source
from tests.models import (
    CASES,
    Convolutions,
    adapted,
    gpt2,
    lora_layers,
    mixtral,
    roberta,
)


@pytest.mark.parametrize("case", CASES)
def test_every_lora_layer_is_found_with_peft_s_scaling_and_orientation(case):
    model = adapted(case)
    layers = dict(lora_layers(model))
    for layer in layers.values():
        nn.init.normal_(layer.lora_B["default"].weight)
    found = AdaptedModel(model).modules
    assert found.keys() == layers.keys()
    for name, module in found.items():
        product = module.scaling * module.factors().product()
        delta = layers[name].get_delta_weight("default").detach()
        assert module.stored_weight(product).shape == module.weight.shape
        torch.testing.assert_close(module.stored_weight(product), delta)
        assert torch.equal(module.matrix(module.stored_weight(product)), product)


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
    "eva": (roberta, {"target_modules": ["query"], "init_lora_weights": "eva"}, "needs data"),
    "mica": (roberta, {"target_modules": ["query"], "init_lora_weights": "mica"}, "MiCA"),
    "narrow pissa": (
        lambda: roberta().bfloat16(),
        {"target_modules": ["query"], "init_lora_weights": "pissa"},
        "would round them in bfloat16; load the base in float32",
    ),
    "experts": (
        mixtral,
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
        "target_parameters: expert weights are not plain products",
    ),
    "groups": (
        lambda: Convolutions(groups=2),
        {"target_modules": ["conv"], "r": 4},
        "conv: convolutions with groups = 2",
    ),
    "dilation": (
        lambda: Convolutions(dilation=2),
        {"target_modules": ["conv"], "r": 4},
        "conv: PEFT ignores dilation = (2, 2)",
    ),
    "attention": (
        lambda: nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}),
        {"target_modules": ["attention"]},
        "attention: PEFT merges attention weights",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_not_be_exact_is_refused_with_the_reason(kind):
    build, options, message = REFUSED[kind]
    model = get_peft_model(build(), LoraConfig(**options))
    with pytest.raises(BridgeError, match="cannot be aggregated exactly") as caught:
        AdaptedModel(model)
    assert message in str(caught.value)


def test_biases_of_a_narrow_base_are_refused_with_the_way_out():
    options = {"target_modules": ["query"], "bias": "lora_only"}
    model = get_peft_model(roberta().bfloat16(), LoraConfig(**options))
    with pytest.raises(BridgeError, match="would round the clients' mean") as caught:
        AdaptedModel(model)
    assert len(caught.value.faults) == 2
    assert "lora.lora_bias" in caught.value.faults[0]


def test_tied_weights_are_never_folded():
    model = get_peft_model(gpt2(), LoraConfig(target_modules=["lm_head", "c_attn"]))
    with pytest.raises(BridgeError, match="shared with other layers") as caught:
        AdaptedModel(model, placement="fold")
    assert caught.value.faults == ("lm_head",)
    found = AdaptedModel(model)
    assert found.placement("lm_head") == "side"
    assert found.placement("transformer.h.0.attn.c_attn") == "fold"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_folds_into_float32_and_nothing_else(dtype):
    model = get_peft_model(roberta().to(dtype), LoraConfig(target_modules=["query"]))
    found = AdaptedModel(model)
    places = {found.placement(name) for name in found.modules}
    assert places == ({"fold"} if dtype == torch.float32 else {"side"})
    assert found.precision() == str(dtype).removeprefix("torch.")


def test_a_fingerprint_says_which_base_it_is():
    def found(build, change=None, **options):
        torch.manual_seed(11)
        base = build()
        if change:
            with torch.no_grad():
                change(base)
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], **options)
        return AdaptedModel(get_peft_model(base, config)).base_fingerprint

    def one_entry(base):
        base.roberta.encoder.layer[1].output.dense.weight[3, 5] += 1e-3

    def swapped(base):
        weight = base.roberta.encoder.layer[0].output.dense.weight
        weight.copy_(weight.flip(0))

    def head(base):
        base.classifier.dense.weight += 1.0

    same = found(roberta)
    assert found(roberta) == same
    # Adapters and trained heads are not part of the base.
    assert found(roberta, r=2, lora_alpha=3) == same
    assert found(roberta, head) == same
    others = {found(roberta, one_entry), found(roberta, swapped)}
    others.add(found(lambda: roberta().bfloat16()))
    assert len(others | {same}) == 4
    assert "entries in float32" in same
    assert "entries in bfloat16" in found(lambda: roberta().bfloat16())


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
        (
            "layers that can be adapted: dense, key, out_proj, position_embeddings, query, "
            "token_type_embeddings, value, word_embeddings"
        ),
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
