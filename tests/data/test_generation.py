"""Texts that a model writes after prompts, and their scores."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as bpe
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers import GenerationConfig as ModelOptions

from fedexlora.data import generation
from fedexlora.data.config import CausalLMTask, TaskConfig
from fedexlora.data.decoding import write_texts
from fedexlora.data.generation import check_metrics, prepare_generation
from fedexlora.data.generation_config import GenerationConfig
from fedexlora.data.load import Splits
from fedexlora.data.score import Score
from fedexlora.data.task import prepare_task
from fedexlora.data.tokenizer import prepare_tokenizer
from fedexlora.errors import DataError
from tests.models import adapted

PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 3, 9], [12, 13], [1, 2, 3, 4, 5, 6, 7, 8]]


def config(**changes):
    return GenerationConfig(**({"metrics": ("bleu",), "max_new_tokens": 7} | changes))


@pytest.fixture(scope="module")
def tokenizer(gpt2):
    return prepare_tokenizer(gpt2, None)


@pytest.fixture(scope="module")
def models(gpt2):
    torch.manual_seed(3)
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
    names = {"vocab_size": 21, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    llama = LlamaConfig(**names, **options, **heads)
    return {
        "gpt2": GPT2LMHeadModel.from_pretrained(gpt2),
        "llama": LlamaForCausalLM(llama),
        "gemma2": Gemma2ForCausalLM(
            Gemma2Config(**names, head_dim=4, sliding_window=4, **options, **heads)
        ),
    }


def by_hand(model, prompt, count):
    """Greedy decoding without batch, padding, cache or `generate`."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model.eval()(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == 0:
                break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_padded_batch_is_what_each_prompt_gives_alone(name, models, tokenizer):
    model = models[name]
    written = write_texts(model, PROMPTS, tokenizer, config(batch_size=5))
    for prompt, found in zip(PROMPTS, written, strict=True):
        tokens = by_hand(model, prompt, 7)
        assert found.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert found.finished == (tokens[-1] == 0)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_texts_do_not_depend_on_the_batch(name, beams, models, tokenizer):
    options = {"num_beams": beams, "no_repeat_ngram_size": 2}
    together = write_texts(models[name], PROMPTS, tokenizer, config(batch_size=4, **options))
    seen = []
    alone = write_texts(
        models[name],
        PROMPTS,
        tokenizer,
        config(batch_size=1, **options),
        lambda done, of: seen.append((done, of)),
    )
    assert together == alone
    assert seen == [(i, 5) for i in range(1, 6)]


def test_beams_and_their_options_are_passed_on(models, tokenizer, monkeypatch):
    model, asked = models["gpt2"], []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **x: asked.append(x) or generate(**x))
    beams = {"num_beams": 4, "length_penalty": 0.9, "no_repeat_ngram_size": 4}
    write_texts(model, PROMPTS, tokenizer, config(**beams))
    options = asked[0]["generation_config"]
    assert {key: getattr(options, key) for key in beams} == beams
    assert options.do_sample is False
    assert options.max_new_tokens == 7


def test_beams_find_a_likelier_text_and_repeat_nothing(models, tokenizer):
    model = models["gpt2"]

    def mean_log_probability(prompt, text):
        ids = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            logits = model.eval()(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
        return float(sum(logits[len(prompt) - 1 + i, x] for i, x in enumerate(ids)) / len(ids))

    greedy = write_texts(model, PROMPTS, tokenizer, config())
    beams = write_texts(model, PROMPTS, tokenizer, config(num_beams=8))
    pairs = [
        (mean_log_probability(p, a.text), mean_log_probability(p, b.text))
        for p, a, b in zip(PROMPTS, greedy, beams, strict=True)
        if not a.finished and not b.finished
    ]
    assert pairs
    assert all(b >= a - 1e-6 for a, b in pairs)
    for found in write_texts(model, PROMPTS, tokenizer, config(no_repeat_ngram_size=2)):
        words = found.text.split()
        assert max(Counter(pairwise(words)).values(), default=1) == 1


def test_a_text_without_an_end_is_cut_and_said(models, tokenizer):
    def never(module, arguments, output):
        output.logits[..., 0] = -1e9
        return output

    model = models["llama"]
    hook = model.register_forward_hook(never)
    try:
        written = write_texts(model, PROMPTS, tokenizer, config(max_new_tokens=9))
    finally:
        hook.remove()
    assert [x.finished for x in written] == [False] * 5
    assert {len(x.text.split()) for x in written} == {9}


def test_a_text_ends_before_a_stop_string(models, tokenizer):
    free = write_texts(models["gpt2"], PROMPTS, tokenizer, config(max_new_tokens=12))
    longest = max((x.text.split() for x in free), key=len)
    stop = longest[3]
    for before, after in zip(
        free,
        write_texts(models["gpt2"], PROMPTS, tokenizer, config(max_new_tokens=12, stop=(stop,))),
        strict=True,
    ):
        assert after.text == before.text.split(stop)[0].strip()
        assert after.finished == (before.finished or stop in before.text)


def test_the_model_is_left_as_it_was(tokenizer):
    model = adapted("gpt2-patterns")
    inner = model.get_base_model()
    inner.config.use_cache = False
    inner.generation_config = ModelOptions(do_sample=True, temperature=0.5, repetition_penalty=3.0)
    model.train()
    inner.transformer.h[0].eval()

    def state():
        return (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            inner.generation_config.to_dict(),
            inner.config.to_dict(),
            {k: v for k, v in vars(model.base_model).items() if not k.startswith("_")},
            tokenizer.padding_side,
            torch.get_rng_state().tolist(),
        )

    before, weights = state(), {k: v.clone() for k, v in model.state_dict().items()}
    options, method = inner.generation_config, inner.prepare_inputs_for_generation
    write_texts(model, PROMPTS, tokenizer, config(num_beams=2, batch_size=2))
    assert state() == before
    assert inner.generation_config is options
    assert inner.prepare_inputs_for_generation == method
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_options_in_a_models_files_change_nothing(models, tokenizer, monkeypatch):
    model = models["gpt2"]
    plain = write_texts(model, PROMPTS, tokenizer, config())
    own = ModelOptions(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=3)
    monkeypatch.setattr(model, "generation_config", own)
    assert write_texts(model, PROMPTS, tokenizer, config()) == plain


TASK = {"kind": "causal-lm", "prompt": "q", "completion": "a", "max_length": 16}
ROWS = [
    {"q": "w1 w2", "a": "w3 w4 w5 w6"},
    {"q": "w7", "a": "w8 w9 w1 w2"},
    {"q": "w1 w2", "a": "w4 w4 w6 w6"},
]


def prepared(models, tokenizer, rows=ROWS, task=None, **changes):
    options = {"metrics": ("bleu",), "max_new_tokens": 4} | changes
    config = CausalLMTask(**(TASK | (task or {})), generation=options)
    rows = Dataset.from_list(rows)
    made = prepare_task(config, Splits(rows, rows, ""))
    return prepare_generation(made, rows, tokenizer, models["gpt2"])


def test_rows_with_equal_prompts_are_one_prompt_with_several_references(models, tokenizer):
    made = prepared(models, tokenizer)
    assert list(made.prompt_of_row) == [0, 1, 0]
    assert made.grouped == [[ROWS[0]["a"], ROWS[2]["a"]], [ROWS[1]["a"]]]
    assert len(made.prompts) == 2
    assert made.scores(["w4 w4 w6 w6", "w8 w9 w1 w2"])["bleu"] == pytest.approx(100)
    assert made.scores(["w8 w9 w1 w2", "w4 w4 w6 w6"])["bleu"] < 50


def test_every_row_of_an_answer_rule_is_an_answer(models, tokenizer):
    rows = [{"q": q, "a": f"so #### {a}"} for q, a in (("w1", 3), ("w2", 4), ("w1", 5), ("w3", 6))]
    made = prepared(models, tokenizer, rows, metrics=("gsm8k",))
    scores = made.scores(["it is 3", "4", "no idea"])
    assert scores == {"gsm8k": 0.5, "gsm8k/unparsed": 1.0}


def test_the_reference_may_be_another_column(models, tokenizer):
    rows = [{"q": "w1", "a": "the answer is true", "gold": "true"}]
    made = prepared(models, tokenizer, rows, metrics=("boolq",), reference="gold")
    assert made.scores(["it is true"])["boolq"] == 1.0
    assert made.scores(["it is"]) == {"boolq": 0.0, "boolq/unparsed": 1.0}


def test_scores_come_from_what_the_model_writes(models, tokenizer):
    made = prepared(models, tokenizer)
    written = write_texts(models["gpt2"], made.prompts, tokenizer, made.config)
    scores = made.evaluate(models["gpt2"], tokenizer)
    assert scores.pop("generation/unfinished") == sum(not x.finished for x in written)
    assert scores == made.scores([x.text for x in written])


def test_a_metric_that_fails_has_no_value_and_is_counted(models, tokenizer, monkeypatch, caplog):
    made = prepared(models, tokenizer)
    failed = Score("bleu", None, "it ended with code 1", "a program", "1.0")
    monkeypatch.setattr(generation, "text_scores", lambda *_: [failed])
    assert made.scores(["w1", "w2"]) == {"bleu/uncomputed": 1.0}
    assert "bleu is not computed: it ended with code 1" in caplog.text


def test_prompts_are_those_of_training_with_their_beginning_cut(models, tokenizer):
    rows = [{"q": " ".join(f"w{i}" for i in range(20)), "a": "w1"}]
    made = prepared(models, tokenizer, rows, task={"max_length": 6})
    assert tokenizer.decode(made.prompts[0]) == "w14 w15 w16 w17 w18 w19"
    assert made.notes == ["1 of 1 prompts lose their beginning to task.max_length, 6"]


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"reference": "gold"}, ROWS, "expected a column 'gold'"),
        ({"metrics": ("gsm8k",)}, [{"q": "w1", "a": "none"}], "right answers that cannot be read"),
        ({"max_new_tokens": 255}, ROWS, "max_new_tokens: expected at most 254"),
        (
            {"metrics": ("bleu",)},
            [{"q": "w1", "a": " "}, ROWS[0]],
            r"an empty one in 1 row\(s\), the first is row 1",
        ),
        ({}, [{"q": "", "a": "w1"}, ROWS[0]], "no token to write after"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_run(changes, rows, message, models, tokenizer):
    with pytest.raises(DataError, match=message):
        prepared(models, tokenizer, rows, **changes)


def test_a_missing_package_is_named_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("fedexlora.data.score._version", lambda name: None)
    task = CausalLMTask(**TASK, generation={"metrics": ["gsm8k", "nist", "meteor", "math"]})
    with pytest.raises(DataError) as caught:
        check_metrics(task)
    for name in ("nist: sacrebleu", "meteor: pycocoevalcap", "meteor: java", "math: math-verify"):
        assert f"{name} is missing" in str(caught.value)
    assert "gsm8k" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"metrics": ["blue"]}, "expected some of bleu"),
        ({"metrics": ["bleu", "bleu"]}, "each metric once"),
        ({"metrics": []}, "at least 1"),
        ({"metrics": ["bleu"], "length_penalty": 0.9}, "no effect without num_beams"),
        ({"metrics": ["bleu"], "no_repeat_ngram_size": 1}, "forbids"),
        ({"metrics": ["bleu"], "do_sample": True}, "Extra inputs"),
    ],
)
def test_a_wrong_table_is_refused_with_a_reason(table, message):
    with pytest.raises(ValidationError, match=message):
        CausalLMTask(**TASK, generation=table)


def test_a_resolved_task_can_be_read_again():
    read = TypeAdapter(TaskConfig).validate_python
    for given in (
        {"kind": "causal-lm", "text": "t"},
        TASK | {"generation": {"metrics": ["bleu", "gsm8k"], "stop": ["\n"]}},
    ):
        made = read(given)
        assert read(json.loads(made.model_dump_json(exclude_none=True))) == made
    assert made.headline == "bleu"
    with pytest.raises(ValidationError, match="needs prompts"):
        read({"kind": "causal-lm", "text": "t", "generation": {"metrics": ["bleu"]}})


def byte_model():
    """A random GPT-2 that reads and writes bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(bpe.BPE(vocab={x: i for i, x in enumerate(["<end>", *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>"
    )
    torch.manual_seed(0)
    options = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 320, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=257, **options)), tokenizer


def real(folder, name, count, task):
    """The first rows of a real data set, ready for a model that reads bytes."""
    with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
        rows = Dataset.from_list([json.loads(next(file)) for _ in range(count)])
    model, tokenizer = byte_model()
    made = prepare_task(CausalLMTask(kind="causal-lm", **task), Splits(rows, rows, ""))
    return prepare_generation(made, rows, tokenizer, model), rows, model, tokenizer


def test_rows_of_e2e_with_the_papers_decoding(real_data):
    table = {"metrics": ["e2e_bleu", "nist"], "max_new_tokens": 6, "num_beams": 10}
    table |= {"length_penalty": 0.9, "no_repeat_ngram_size": 4}
    columns = {"prompt": "meaning_representation", "completion": "human_reference"}
    task = columns | {"prompt_template": "{prompt}\n", "generation": table}
    made, rows, model, tokenizer = real(real_data / "e2e_nlg", "validation", 40, task)
    assert len(made.prompts) == len(set(rows["meaning_representation"])) < 40
    assert sum(map(len, made.grouped)) == 40
    perfect = made.scores([references[-1] for references in made.grouped])
    assert perfect["e2e_bleu"] == pytest.approx(100)
    found = made.evaluate(model, tokenizer)
    assert found["e2e_bleu"] < 1
    assert found["generation/unfinished"] > 0


def test_rows_of_gsm8k(real_data):
    columns = {"prompt": "question", "completion": "answer"}
    task = columns | {"generation": {"metrics": ["gsm8k"], "max_new_tokens": 8}}
    made, rows, model, tokenizer = real(real_data / "gsm8k", "test", 12, task)
    assert made.scores(rows["answer"][:]) == {"gsm8k": 1.0, "gsm8k/unparsed": 0.0}
    assert made.notes  # questions of more than 256 bytes
    found = made.evaluate(model, tokenizer)
    assert set(found) == {"gsm8k", "gsm8k/unparsed", "generation/unfinished"}


def test_rows_of_a_commonsense_set(real_data):
    table = {"metrics": ["boolq"], "reference": "answer", "max_new_tokens": 8}
    columns = {"prompt": "instruction", "completion": "output"}
    made, rows, _, _ = real(real_data / "boolq", "test", 12, columns | {"generation": table})
    assert made.scores(rows["output"][:]) == {"boolq": 1.0, "boolq/unparsed": 0.0}
