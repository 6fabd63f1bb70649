"""The model card: its code runs as it stands, and no name in it is obeyed."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedexlora.adapters.card import model_card
from fedexlora.adapters.card_source import Source
from fedexlora.adapters.export import ExportOptions, export_run
from fedexlora.adapters.finished_run import read_finished
from fedexlora.adapters.markdown import code_span, literal
from fedexlora.exchange.adapter_records import ExportRecord

HEADS = {"SEQ_CLS": AutoModelForSequenceClassification, "CAUSAL_LM": AutoModelForCausalLM}
HOSTILE = st.text(
    st.sampled_from(["`", "|", "\n", "\r", "\\", "<", ">", "[", "]", "(", ")", "'", '"', "#", "*"])
    | st.sampled_from(["_", "-", ":", "{", "}", "!", "&", "~", " ", "\x1b", "\u202e", "\u2028"])
    | st.characters(),
    min_size=1,
    max_size=24,
)


@pytest.fixture(scope="module")
def finished(whole):
    return read_finished(whole)


@pytest.fixture(scope="module")
def record(finished):
    return ExportRecord(
        run="run",
        base="base",
        rounds=3,
        rank=2,
        error=0.0,
        worst_module="h.0",
        worst_error=0.0,
        rounding=0.0,
        metrics=finished.records[-1].metrics,
        exported_metrics=None,
        pushed_to=None,
    )


def code(card: str) -> str:
    return re.search(r"^```python\n(.*?)^```$", card, re.M | re.S)[1]


def executed(card: str, folder: Path, base: str, monkeypatch) -> dict:
    """What the card's code leaves behind, run where the card is; a local base lies beside it."""
    if base and not (folder / Path(base).name).exists():
        (folder / Path(base).name).symlink_to(base)
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(compile(code(card), "README.md", "exec"), found)
    return found


def changed(finished, task: dict, config: dict, **more: object):
    recipe = finished.recipe.model_dump(mode="json", exclude_none=True)
    recipe = {**recipe, "task": task, **more}
    recipe["model"] = {
        **finished.recipe.model.model_dump(exclude_none=True),
        **more.get("model", {}),
    }
    header = {**finished.header, "model_config": config}
    return replace(finished, recipe=type(finished.recipe).model_validate(recipe), header=header)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_its_code_gives_the_labels_shares_that_the_run_scored(
    kind, whole, bert, tmp_path, monkeypatch, capsys
):
    export_run(whole, tmp_path / "out", ExportOptions(kind=kind))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    base = bert if kind == "adapter" else ""
    found = executed(card, tmp_path / "out", base, monkeypatch)
    told = ast.literal_eval(capsys.readouterr().out)
    plain = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    expected = PeftModel.from_pretrained(plain, str(whole / "adapter"))
    with torch.inference_mode():
        logits = expected(
            **AutoTokenizer.from_pretrained(bert)("A text", return_tensors="pt")
        ).logits
    assert list(told) == ["x", "y"]
    assert list(told.values()) == pytest.approx(logits[0].softmax(-1).tolist(), rel=1e-4)
    assert found["model"].config.id2label == {0: "x", 1: "y"}
    assert str(Path(bert).parent) not in card, "it names a folder of this machine"


PAIR = {"kind": "classification", "text": ["one", "two"], "max_length": 12}
TASKS = {
    "pair": (PAIR, {"id2label": {"1": "no", "0": "yes"}}, "SEQ_CLS", "bert"),
    "regression": ({"kind": "regression", "text": "text"}, {"num_labels": 1}, "SEQ_CLS", "bert"),
    "text": ({"kind": "causal-lm", "text": "text"}, {}, "CAUSAL_LM", "gpt2"),
    "prompt": (
        {"kind": "causal-lm", "prompt": "p", "completion": "c"}
        | {"prompt_template": "Q: {prompt}\n'''\"\"\""},
        {},
        "CAUSAL_LM",
        "gpt2",
    ),
    "chat": (
        {
            "kind": "chat",
            "chat_template": "{% for m in messages %}'\"{{ m.content }}\n{% endfor %}",
        },
        {},
        "CAUSAL_LM",
        "gpt2",
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_its_code_runs_for_every_kind_of_task(
    name, finished, record, request, tmp_path, monkeypatch, capsys
):
    task, config, task_type, fixture = TASKS[name]
    base = request.getfixturevalue(fixture)
    outputs = {"num_labels": 1 if name == "regression" else 2} if fixture == "bert" else {}
    model = HEADS[task_type].from_pretrained(base, **outputs)
    lora = LoraConfig(task_type=task_type, r=2, target_modules=["query" if outputs else "c_attn"])
    get_peft_model(model, lora).save_pretrained(tmp_path)
    run = changed(finished, task, config, model={"source": base})
    found = executed(model_card(run, record, merged=False), tmp_path, base, monkeypatch)
    assert isinstance(found["model"], PeftModel)
    told = capsys.readouterr().out.strip()
    if name == "pair":
        assert list(ast.literal_eval(told)) == ["yes", "no"]
    if name == "regression":
        assert torch.isfinite(torch.tensor(float(told)))


def test_a_quantised_base_is_loaded_as_the_run_loaded_it(finished, record):
    config = {"id2label": {"0": "x", "1": "y"}}
    task = finished.recipe.task.model_dump(mode="json", exclude_none=True)
    model = {"source": "org/model", "quantization": "nf4", "dtype": "bfloat16", "revision": "v1"}
    card = model_card(changed(finished, task, config, model=model), record, merged=False)
    calls = [node for node in ast.walk(ast.parse(code(card))) if isinstance(node, ast.Call)]
    words = {word.arg: word.value for call in calls for word in call.keywords}
    told = {w.arg: ast.literal_eval(w.value) for w in words["quantization_config"].keywords}
    assert told["bnb_4bit_quant_type"] == "nf4"
    assert told["bnb_4bit_compute_dtype"] == "bfloat16"
    assert r"(.*\.)?pooler" in told["llm_int8_skip_modules"]
    assert [ast.literal_eval(words[key]) for key in ("dtype", "revision")] == ["bfloat16", "v1"]
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/model"


def test_sources_are_named_as_somebody_else_finds_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "rows").mkdir(parents=True)
    assert Source.of("data/rows") == Source("folder", "rows")
    assert Source.of("./elsewhere/rows/") == Source("folder", "rows")
    assert Source.of(f"{tmp_path}/gone") == Source("folder", "gone")
    assert Source.of(".") == Source("folder", tmp_path.name)
    assert Source.of("glue", "v2") == Source("hub", "glue", "v2")
    assert Source.of("openai-community/gpt2").code("base") == ['base = "openai-community/gpt2"']
    package = Source.of("package:transformers/models")
    assert "`pip install transformers`" in package.describe()
    found: dict = {}
    exec("\n".join(["from importlib.resources import files", *package.code("base")]), found)
    assert os.path.isdir(found["base"])  # noqa: PTH112 - it is a string, as a user has it


@given(name=HOSTILE)
def test_a_code_span_shows_a_name_and_nothing_else(name):
    for text in (
        f"- **base**: {code_span(name)}, and more",
        f"a {code_span(name)}, {code_span(name)}",
    ):
        inline = [t for t in MarkdownIt("commonmark").parse(text) if t.type == "inline"]
        assert len(inline) == 1
        kinds = [t.type for t in inline[0].children]
        assert set(kinds) <= {"text", "code_inline", "strong_open", "strong_close"}
    shown = [t.content for t in inline[0].children if t.type == "code_inline"]
    if "`" not in name:
        expected = "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
        assert [one.strip(" ") for one in shown] == [expected.strip(" ")] * 2


@given(name=HOSTILE)
def test_a_literal_is_the_string_on_one_line(name):
    assert ast.literal_eval(literal(name)) == name
    assert literal(name).isprintable()


@settings(max_examples=40)
@given(names=st.lists(HOSTILE, min_size=2, max_size=3, unique=True), source=HOSTILE, module=HOSTILE)
def test_a_card_of_hostile_names_is_what_it_would_be_with_plain_ones(
    finished, record, names, source, module
):
    labels = {str(number): name for number, name in enumerate(names)}
    task = {"kind": "classification", "text": "text"}
    # No path has a zero, and no recipe half of a surrogate pair.
    source = source.replace("\0", "").encode(errors="ignore").decode()
    data = {"source": f"/{source}"}
    run = changed(finished, task, {"id2label": labels}, data=data, model={"source": f"/{source}"})
    last = run.records[-1]
    worst = last.certificate.model_copy(update={"worst_module": module})
    run = replace(run, records=(last.model_copy(update={"certificate": worst}),))
    card = model_card(run, record, merged=False)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-classification"
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    kinds = {t.type for t in tokens} | {c.type for t in tokens for c in t.children or ()}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "hr", "blockquote_open"}
    assert [t.tag for t in tokens if t.type == "heading_open"] == ["h1", "h2", "h2"]
    assert len([t for t in tokens if t.type == "list_item_open"]) == 15
    program = next(t.content for t in tokens if t.type == "fence")
    (stored,) = [
        node.value
        for node in ast.parse(program).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "labels"
    ]
    assert ast.literal_eval(stored) == names
