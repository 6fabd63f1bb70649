"""Every recipe of the repository is valid, and the data-set recipes run at a reduced size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from fedexlora.engine.recipe import load_recipe
from fedexlora.engine.run import run

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
"""Those below ``base`` are none by themselves."""
DATA_SETS = {"cola": "cola", "sst2": "sst2", "rte": "rte", "stsb": "stsb", "e2e": "e2e_nlg"}


def test_all_recipes_are_seen():
    assert len(RECIPES) >= 8
    assert {path.stem for path in RECIPES} >= DATA_SETS.keys()


def test_a_base_is_extended_by_recipes():
    bases = {f'extends = "base/{path.name}"' for path in (ROOT / "recipes" / "base").glob("*")}
    said = {line for path in RECIPES for line in path.read_text().splitlines()}
    assert bases <= said


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_survives_being_written_out(path, tmp_path):
    recipe = load_recipe(path)
    copy = tmp_path / "resolved.toml"
    copy.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(copy) == recipe


def texts(folder: Path) -> list[str]:
    rows = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return rows[:2000]


def byte_pairs(folder: Path, data: Path, special: dict[str, str], post: bool) -> None:
    """A tokenizer trained on the data set's own text."""
    inner = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    inner.train_from_iterator(
        texts(data), trainers.BpeTrainer(vocab_size=600, special_tokens=[*set(special.values())])
    )
    if post:
        ends = [(x, inner.token_to_id(x)) for x in ("<s>", "</s>")]
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
        )
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


def small_model(name: str, folder: Path, data: Path) -> None:
    """A small random-weight model of the recipe's own class, with a tokenizer."""
    torch.manual_seed(0)
    if name == "e2e":
        byte_pairs(folder, data, {"eos_token": "<end>", "unk_token": "<end>"}, post=False)
        config = GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=2, n_positions=128)
        GPT2LMHeadModel(config).save_pretrained(folder)
        return
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    special |= {"cls_token": "<s>", "sep_token": "</s>"}
    byte_pairs(folder, data, special, post=True)
    config = RobertaConfig(
        vocab_size=600,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=140,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_SETS)
def test_a_recipe_runs_on_its_real_data_at_a_reduced_size(name, real_data, tmp_path):
    data, model = real_data / DATA_SETS[name], tmp_path / "model"
    small_model(name, model, data)
    recipe = load_recipe(
        ROOT / "recipes" / f"{name}.toml",
        [
            f"data.source={data}",
            f"model.source={model}",
            "data.max_train_rows=96",
            "data.max_validation_rows=48",
            "federation.rounds=2",
            "training.num_train_epochs=1",
            "training.per_device_train_batch_size=8",
            "training.warmup_steps=0",
        ],
    )
    result = run(recipe, tmp_path / "run")
    for record in result.records:
        assert record.certificate.held
        assert len(record.clients) == 3
        assert recipe.task.headline in record.metrics
    assert (result.adapter / "adapter_model.safetensors").exists()
