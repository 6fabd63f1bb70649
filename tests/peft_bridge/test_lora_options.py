"""What of ``[lora]`` is accepted is also exported, and is the model when PEFT loads it again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from fedexlora.errors import BridgeError
from fedexlora.peft_bridge.export import file_names, save_factors, save_global
from fedexlora.peft_bridge.load import attach_lora, lora_faults
from fedexlora.peft_bridge.model import AdaptedModel
from tests.models import base_of, logits
from tests.rounds.scripted import federation, run_round

QUERIES = ["query", "value"]
OPTIONS = {
    "all linear layers": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*layer\.[01]\.attention.*\.(query|key)"},
    "some layers": {
        "target_modules": ["query"],
        "layers_to_transform": [1],
        "layers_pattern": "layer",
    },
    "excluded": {"target_modules": QUERIES, "exclude_modules": ["0.attention.self.value"]},
    "rank-stabilised, with patterns": {
        "target_modules": QUERIES,
        "use_rslora": True,
        "alpha_pattern": {"value": 3},
        "rank_pattern": {"layer.0.attention.self.query": 5},
    },
    "an embedding": {"target_modules": ["word_embeddings", "query"]},
    "another trained module": {
        "target_modules": ["query"],
        "modules_to_save": ["position_embeddings"],
    },
    "no targets": {},
    "part of the head": {"target_modules": ["query", "out_proj"]},
    "dense layers": {"target_modules": ["dense"]},
    "every bias": {"target_modules": ["query"], "bias": "all"},
    "every bias, all linear layers": {"target_modules": "all-linear", "bias": "all"},
    "biases of adapted layers": {"target_modules": ["query"], "bias": "lora_only"},
    "biases of factors": {"target_modules": ["query"], "lora_bias": True},
    "dropout": {"target_modules": ["query"], "lora_dropout": 0.5},
    "gaussian": {"target_modules": ["query"], "init_lora_weights": "gaussian"},
}


def prepared(options: dict) -> AdaptedModel:
    """The model of a recipe with these options, or a refusal: nothing is refused later."""
    table = {"r": 2, "lora_alpha": 5, **options}
    if faults := lora_faults(table):
        raise BridgeError("[lora]", faults)
    model = AdaptedModel(attach_lora(base_of("roberta"), table, "SEQ_CLS", 1))
    file_names(model)
    return model


def comes_back(model: AdaptedModel) -> None:
    """A round of three clients; the version, and its adapter without remainder, load again."""
    parts, state = federation(model, "fedex")
    state, _ = run_round(parts, state)
    same(model, lambda folder: save_global(model, state, folder))
    if not model.taken_out:  # else its factors alone are no adapter, which is another test's
        model.apply(model.initial_state())
        same(model, lambda folder: save_factors(model, state.adapter, state.dense, folder))


def same(model: AdaptedModel, save: Callable[[Path], None]) -> None:
    """What PEFT loads on the untouched base says what the live model says."""
    said = logits(model.peft_model)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        loaded = PeftModel.from_pretrained(base_of("roberta"), folder)
    assert (logits(loaded) - said).norm() <= 1e-5 * said.norm()
    assert (logits(base_of("roberta")) - said).norm() > 1e-2 * said.norm(), "it must matter"


@pytest.mark.parametrize("options", OPTIONS)
def test_an_accepted_option_comes_back(options):
    comes_back(prepared(OPTIONS[options]))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {
            "r": st.sampled_from([1, 3]),
            "target_modules": st.sampled_from([QUERIES, ["dense"], ["word_embeddings", "key"]]),
            "bias": st.sampled_from(["none", "all", "lora_only"]),
            "use_rslora": st.booleans(),
            "modules_to_save": st.sampled_from([None, ["classifier"], ["LayerNorm"]]),
        },
        optional={
            "lora_bias": st.booleans(),
            "rank_pattern": st.just({"query": 4}),
            "exclude_modules": st.just(r".*classifier.*"),
            "init_lora_weights": st.sampled_from(["orthogonal", "pissa"]),
        },
    )
)
def test_options_together_come_back_or_are_refused(options):
    try:
        model = prepared(options)
    except BridgeError:
        return
    comes_back(model)
