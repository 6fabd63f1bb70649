"""Tiny tokenizers, random models and data sets, all made on the spot."""

import json
import os
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from fedexlora.data.load import Splits, fingerprint

# What an example takes says more of the machine than of the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory):
    """Keep what `load_dataset` converts out of the user's cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("cache"))
    yield
    datasets.config.HF_DATASETS_CACHE = before


def word_tokenizer(special, pair):
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=special.get("unk_token", "w0")))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if pair:
        ids = [(x, vocabulary[x]) for x in ("[CLS]", "[SEP]")]
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
        )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if pair else [])]
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=names, **special)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A folder with a random BERT and a tokenizer that makes `[CLS] a [SEP] b [SEP]`."""
    return save_bert(tmp_path_factory.mktemp("bert"))


def save_bert(folder):
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    word_tokenizer(special, pair=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=128,
        pad_token_id=0,
        initializer_range=0.5,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A folder with a random GPT-2 and a tokenizer that has an end token, but none to pad with."""
    return save_gpt2(tmp_path_factory.mktemp("gpt2"))


def save_gpt2(folder):
    word_tokenizer({"eos_token": "<end>"}, pair=False).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=21,
        n_embd=12,
        n_layer=2,
        n_head=2,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write(tmp_path):
    """Write rows, or text, to a file of the test's data folder; returns the folder."""

    def write_file(name, content):
        text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return write_file


@pytest.fixture
def splits():
    """Make splits of two lists of rows."""

    def make(train, validation=None):
        parts = [datasets.Dataset.from_list(rows) for rows in (train, validation or train)]
        return Splits(*parts, fingerprint(*parts))

    return make


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets; the test is skipped where there is none."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FEDEXLORA_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; name their folder in FEDEXLORA_DATA")
    return folder
