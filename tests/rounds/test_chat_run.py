"""Whole runs on chat data: a tiny Llama, conversations with systems and tools, its own template."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tomlkit
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedexlora.adapters.evaluation import evaluate
from fedexlora.errors import DataError, RecipeError
from fedexlora.flower.node import recipe_for_nodes
from fedexlora.rounds.recipe import load_recipe, parse_recipe
from fedexlora.rounds.run import run
from tests.data.chats import chat, chat_tokenizer, template
from tests.rounds.test_run import StopAt, same_run


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A random Llama, and a tokenizer that has a template of the family's."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = chat_tokenizer("llama3", template("llama3"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def conversation(generator: random.Random) -> list[dict[str, str]]:
    number = generator.randrange(100)
    turns = [f"u: what is {number}?", f"a: it is {number + 1}"]
    if number % 2:
        turns = ["s: be brief", *turns]
    if number % 3:
        turns += ["u: look it up", "a: call(it)", f"t: {number}", f"a: {number}"]
    return chat(*turns)


@pytest.fixture
def document(llama, tmp_path) -> dict:
    generator = random.Random(3)
    for name, count in (("train", 24), ("validation", 6)):
        rows = [{"messages": conversation(generator), "gold": str(i)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "model": {"source": str(llama)},
        "task": {"kind": "chat", "max_length": 64},
        "data": {"source": str(tmp_path)},
        "partition": {"kind": "iid", "clients": 3},
        "federation": {"rounds": 2, "seed": 1},
        "lora": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
        "training": {"learning_rate": 3e-2, "per_device_train_batch_size": 4, "use_cpu": True},
    }


def test_a_chat_recipe_trains_and_resumes_to_the_same_bits(document, tmp_path):
    """With what the model writes for each last answer, on the validation rows and on a set."""
    generation = {"metrics": ["gsm8k", "bleu"], "reference": "gold", "max_new_tokens": 6}
    document["task"]["generation"] = generation
    document["evaluation"] = {
        "sets": {"four": {"data": {"max_validation_rows": 4}}},
        "mean": ["gsm8k", "four.gsm8k"],
    }
    parsed = parse_recipe(document, "test")
    assert "generation" not in recipe_for_nodes(parsed, parsed.task.model_dump())["task"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(parsed, whole)
    with pytest.raises(KeyboardInterrupt):
        run(parsed, stopped, observer=StopAt(2, "train client-01"))
    run(parsed, stopped, resume=True)
    same_run(whole, stopped)
    records = [json.loads(line) for line in (whole / "rounds.jsonl").read_text().splitlines()]
    assert records[1]["metrics"]["loss"] < records[0]["metrics"]["loss"]
    written = {"gsm8k", "gsm8k/unparsed", "bleu", "generation/unfinished"}
    own = written | {"loss", "perplexity"}
    last = records[-1]["metrics"]
    assert set(last) == own | {f"four.{name}" for name in own} | {"mean"}
    assert last["mean"] == (last["gsm8k"] + last["four.gsm8k"]) / 2
    header = json.loads((whole / "run.json").read_text())
    assert header["headline"] == "mean"
    assert header["scorers"]["mean"]["implementation"] == "the mean of gsm8k, four.gsm8k"
    assert header["scorers"]["four.bleu"] == header["scorers"]["bleu"]
    assert any("prompts lose their beginning" in note for note in header["notes"])
    again = evaluate(str(whole))
    assert again.recorded == last
    assert again.metrics == pytest.approx(last, rel=1e-5)
    assert header["cut_rows"]["training"]["cut"] > 0
    assert header["notes"]


def test_a_template_is_read_from_its_file_and_kept_as_text(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = template("chatml", marked=True)
    Path("own.jinja").write_text(source, encoding="utf-8")
    document["task"]["chat_template"] = "own.jinja"
    Path("recipe.toml").write_text(tomlkit.dumps(document), encoding="utf-8")
    loaded = load_recipe(Path("recipe.toml"))
    assert loaded.task.chat_template == source
    Path("resolved.toml").write_text(loaded.to_toml(), encoding="utf-8")
    Path("own.jinja").unlink()
    assert load_recipe(Path("resolved.toml")) == loaded
    with pytest.raises(RecipeError, match=r"task.chat_template: own.jinja cannot be read: No such"):
        load_recipe(Path("recipe.toml"))


def test_a_file_that_a_recipe_names_to_another_machine_is_not_read(document):
    document["task"]["chat_template"] = "/etc/own.jinja"
    with pytest.raises(RecipeError, match="expected a Jinja template, .*found '/etc/own.jinja'"):
        parse_recipe(document, "of a server")


def test_a_template_that_is_too_long_is_refused_and_not_cut(document, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ '' }}" + " " * 100_000, encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(tomlkit.dumps(document), encoding="utf-8")
    with pytest.raises(RecipeError, match="expected at most 100,000 characters"):
        load_recipe(tmp_path / "recipe.toml", [f"task.chat_template={tmp_path}/own.jinja"])


def test_a_fault_of_a_row_leaves_nothing_behind(document, tmp_path):
    broken = {"messages": chat("u: hello", "a: ")}
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(broken))
    with pytest.raises(DataError, match="training, row 25, message 2: .* found an empty one"):
        run(parse_recipe(document, "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
