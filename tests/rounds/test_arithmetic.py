"""Runs in mixed precision: where the remainder goes, what is stated of it, how it is scored."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedexlora.adapters.export import ExportOptions, export_run
from fedexlora.errors import RecipeError
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.preparation import prepare
from fedexlora.rounds.recipe import parse_recipe
from fedexlora.rounds.run import run
from tests.conftest import word_tokenizer
from tests.rounds.test_variants import changed

BF16 = {"training": {"bf16": True}}
LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama whose k_proj and v_proj are not square, and a word tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    word_tokenizer(special, pair=False).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def causal(document: dict, llama: str) -> dict:
    """The same rows as texts."""
    made = {key: dict(value) for key, value in document.items()}
    made["model"] = {"source": llama}
    made["task"] = {"kind": "causal-lm", "text": "text", "max_length": 16}
    made["lora"] = LORA
    made["federation"] = {"rounds": 2, "seed": 4}
    return made


@pytest.mark.parametrize(
    "model", [{}, {"dtype": "bfloat16"}, {"quantization": "nf4"}], ids=["float32", "bf16", "nf4"]
)
def test_under_autocast_the_remainder_is_beside_the_weight_and_comes_out(
    document, llama, tmp_path, model
):
    recipe = parse_recipe(changed(causal(document, llama), BF16 | {"model": model}), "test")
    result = run(recipe, tmp_path / "run")
    for record in result.records:
        certificate = record.certificate
        assert certificate.placement == "side"
        assert certificate.error <= 1e-6
        assert certificate.worst_forward <= 1e-2
        assert 0.99 <= certificate.kept <= 1.01
        assert certificate.kept_error < 0.01
        assert all(m.forward <= 1e-2 and 0.99 <= m.kept <= 1.01 for m in record.modules)
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    assert header["arithmetic"]["training"] == "bfloat16 autocast"


def test_a_fold_that_is_asked_for_states_what_it_loses(document, llama, tmp_path):
    change = {"training": {"bf16": True, "learning_rate": 2e-3}}
    found = {}
    for placement in ("auto", "fold"):
        table = {"federation": {"placement": placement, "rounds": 2, "seed": 4}}
        recipe = parse_recipe(changed(causal(document, llama), change | table), "test")
        found[placement] = [r.certificate for r in run(recipe, tmp_path / placement).records]
    for beside, folded in zip(found["auto"], found["fold"], strict=True):
        assert (beside.placement, folded.placement) == ("side", "fold")
        assert folded.error <= folded.allowed
        assert beside.forward < 3e-3
        assert folded.worst_forward >= folded.forward > 0.015


def test_in_float32_nothing_is_lost_on_the_way(whole):
    lines = (whole / "rounds.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        error = record["certificate"]["error"]
        assert record["certificate"]["forward"] == pytest.approx(error, rel=0.05)
        assert record["certificate"]["kept"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("training", [{}, {"bf16": True}], ids=["float32", "autocast"])
@pytest.mark.parametrize("scoring", ["float32", "bfloat16"])
def test_scores_are_computed_in_the_stated_dtype(document, tmp_path, training, scoring):
    """By the run before round 1 and after each, by export, and by plain torch: the same."""
    change = {"training": training, "evaluation": {"dtype": scoring}}
    recipe = parse_recipe(changed(document, change), "test")
    result = run(recipe, tmp_path / "run")
    exported = export_run(tmp_path / "run", tmp_path / "out", ExportOptions(evaluate=True))
    if scoring == "float32":
        assert exported.exported_metrics == pytest.approx(exported.metrics, rel=1e-4)
    # Beside the weight a remainder is added in float32; PEFT adds an exported adapter in bfloat16.
    assert exported.exported_metrics["loss"] == pytest.approx(exported.metrics["loss"], rel=1e-2)
    prepared, _ = prepare(recipe, Observer())
    with torch.autocast("cpu", torch.bfloat16, enabled=scoring == "bfloat16"):
        plain = prepared.task.evaluate(
            prepared.model.peft_model, prepared.scoring.validation, prepared.scoring.tokenizer, 64
        )
    assert dict(result.initial_metrics) == plain
    other = "float32" if scoring == "bfloat16" else "bfloat16"
    again = parse_recipe(changed(document, {"evaluation": {"dtype": other}}), "test")
    assert prepare(again, Observer())[0].evaluate(Observer())["loss"] != plain["loss"]


def test_a_resolved_recipe_states_the_dtype_of_scoring(document):
    assert 'dtype = "float32"' in parse_recipe(document, "test").to_toml().split("[evaluation]")[1]
    narrow = parse_recipe(changed(document, {"model": {"dtype": "bfloat16"}}), "test")
    assert narrow.scoring_dtype == narrow.evaluation.dtype == "bfloat16"


def test_weights_are_not_scored_wider_than_they_are(document):
    change = {"model": {"dtype": "bfloat16"}, "evaluation": {"dtype": "float32"}}
    with pytest.raises(RecipeError, match="evaluation.dtype: bfloat16 weights cannot"):
        parse_recipe(changed(document, change), "test")
