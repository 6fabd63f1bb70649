"""What other programs make of a result: servers that know no patterns, tokenizers, added tokens."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedexlora import aggregate_adapters, compress_adapter
from fedexlora.adapters.merge import merge_adapter
from fedexlora.errors import AdapterError
from tests.adapters.folders import fill, ideal, store_all, updates
from tests.cli.invoke import fedexlora
from tests.models import VOCABULARY, base_of

VARIANTS = ({"r": 3}, {"rank_pattern": {"v_proj": 5}, "use_rslora": False}, {})
ADDED = VOCABULARY + 3


def by_the_rank_of_the_tensor(folder):
    """Updates as llama.cpp makes them: ``lora_alpha`` over the rank of the layer's own tensor."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_B.weight"): (
            alpha / b.shape[1] * b.double() @ tensors[key.replace("lora_B", "lora_A")].double()
        )
        for key, b in tensors.items()
        if "lora_B" in key
    }


@pytest.mark.parametrize("options", [[], ["--rank", "6"], ["--tolerance", "0.3"]])
def test_one_rank_is_right_for_servers_that_read_it_off_the_tensors(tmp_path, options):
    folders = store_all(tmp_path, "llama-rslora", VARIANTS)
    words = ["aggregate", *folders, "--weights", "1,2,5", *options]
    assert fedexlora(*words, "--out", tmp_path / "plain").returncode == 0
    done = fedexlora(*words, "--out", tmp_path / "padded", "--uniform-rank")
    assert done.returncode == 0, done.stderr
    wanted = updates("llama-rslora", tmp_path / "plain")
    padded = updates("llama-rslora", tmp_path / "padded")
    served = by_the_rank_of_the_tensor(tmp_path / "padded")
    for name, update in wanted.items():
        for found in (padded[name], served[name]):
            assert float((found - update).norm() / update.norm()) < 1e-9
    config = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not [p.name for p in (tmp_path / "padded").iterdir() if "narrow" in p.name]


def test_without_it_layers_of_lower_rank_come_out_too_large(tmp_path):
    """The reason for the option; the day that this fails, it is not needed any more."""
    folders = store_all(tmp_path, "llama-rslora", VARIANTS)
    aggregate_adapters(folders, tmp_path / "plain", tolerance=0.3)
    wanted = updates("llama-rslora", tmp_path / "plain")
    served = by_the_rank_of_the_tensor(tmp_path / "plain")
    assert max(float((served[n] - u).norm() / u.norm()) for n, u in wanted.items()) > 0.1


def test_heads_and_kernels_are_kept_at_one_rank(tmp_path):
    for case, changes in (("roberta", VARIANTS[:1] * 2), ("patches", ({}, {"r": 7}))):
        folders = store_all(tmp_path / case, case, changes)
        aggregate_adapters(folders, tmp_path / case / "a")
        compress_adapter(tmp_path / case / "a", tmp_path / case / "b", uniform_rank=True)
        before, after = (load_file(tmp_path / case / x / "adapter_model.safetensors") for x in "ab")
        for key in (key for key in before if "lora_" not in key):
            assert torch.equal(before[key], after[key])
        for name, wanted in ideal(case, folders, [1, 1]).items():
            found = updates(case, tmp_path / case / "b")[name]
            assert float((found - wanted).norm() / wanted.norm()) < 1e-6


def tokenizer(folder, words, **settings):
    folder.mkdir(exist_ok=True)
    content = {"model": {"vocab": {word: i for i, word in enumerate(words)}}, **settings}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(folder)}))


def test_one_tokenizer_is_carried_over(tmp_path):
    folders = store_all(tmp_path, "roberta-biases", ({}, {}, {}))
    tokenizer(folders[0], "abc", truncation={"max_length": 9})
    tokenizer(folders[2], "abc")
    done = aggregate_adapters(folders, tmp_path / "mean")
    assert done.tokenizer == ("tokenizer.json", "tokenizer_config.json")
    held = (tmp_path / "mean" / "tokenizer.json").read_bytes()
    assert held == (folders[0] / "tokenizer.json").read_bytes()


def test_two_tokenizers_are_refused(tmp_path):
    folders = store_all(tmp_path, "roberta-biases", ({}, {}, {}))
    tokenizer(folders[0], "abc")
    tokenizer(folders[2], "acb")
    with pytest.raises(AdapterError, match=r"site-3/tokenizer.json: differs from .*site-1"):
        aggregate_adapters(folders, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def resized(folder, seed, trained):
    """An adapter that was trained after tokens were added, stored by PEFT."""
    torch.manual_seed(3)
    model = base_of("llama-rslora")
    model.resize_token_embeddings(ADDED)
    settings = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    live = get_peft_model(model, LoraConfig(**settings, modules_to_save=trained))
    fill(live, seed)
    live.save_pretrained(str(folder))
    return folder


def test_a_merge_has_the_rows_of_added_tokens_and_their_tokenizer(tmp_path):
    base_of("llama-rslora").save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base", "ab")
    trained = ["embed_tokens", "lm_head"]
    folders = [resized(tmp_path / f"{i}", i, trained) for i in range(3)]
    for folder in folders:
        tokenizer(folder, "abc")
    aggregate_adapters(folders, tmp_path / "mean", weights=[1, 2, 5])
    done = merge_adapter(tmp_path / "mean", str(tmp_path / "base"), tmp_path / "merged")
    assert done.error < 1e-6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == ADDED
    assert "c" in (tmp_path / "merged" / "tokenizer.json").read_text()
    plain = base_of("llama-rslora")
    plain.resize_token_embeddings(ADDED)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "mean").eval()
    ids = torch.tensor([[1, 5, ADDED - 1, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)


def test_rows_that_nobody_stored_are_refused_with_the_way_to_make_them(tmp_path):
    base_of("llama-rslora").save_pretrained(tmp_path / "base")
    folder = resized(tmp_path / "a", 1, ["embed_tokens"])
    with pytest.raises(AdapterError, match=rf"resize_token_embeddings\({ADDED}\)") as caught:
        merge_adapter(folder, str(tmp_path / "base"), tmp_path / "merged")
    assert "lm_head.weight" in str(caught.value)
