"""Which of a row's possible answers is the likeliest."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from transformers import GPT2LMHeadModel

from fedexlora.data.choices import Choices, prepare_choices
from fedexlora.data.config import CausalLMTask
from fedexlora.data.load import Splits
from fedexlora.data.task import prepare_task
from fedexlora.data.tokenizer import prepare_tokenizer
from fedexlora.errors import DataError
from tests.data.test_generation import byte_model

TASK = {"kind": "causal-lm", "prompt": "q", "completion": "a", "max_length": 32}
CHOICES = {"answers": ["w1", "w2", "w12"], "template": "w5 {choice} w6", "reference": "gold"}


def rows(count):
    words = ["w1 w2", "w2 w12", "w12 w1 w2", "w1 w12"]
    made = []
    for i in range(count):
        offered = words[i % 4]
        gold = offered.split()[i % len(offered.split())]
        made.append({"q": f"{'w3 ' * (i % 5)}w{i % 9 + 3} {offered}", "a": "w9", "gold": gold})
    return made


def prepared(made, tokenizer, **changes):
    task = CausalLMTask(**TASK, choices=CHOICES | changes)
    data = Dataset.from_list(made)
    return prepare_choices(prepare_task(task, Splits(data, data, "")), data, tokenizer)


def by_hand(model, tokenizer, row):
    """The answers of a row by their log-likelihood, one forward pass each, in float64."""
    found = {}
    for answer in (x for x in CHOICES["answers"] if x in row["q"].split()):
        prompt = tokenizer(row["q"])["input_ids"]
        target = [*tokenizer(f"w5 {answer} w6")["input_ids"], tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model.double().eval()(torch.tensor([prompt + target])).logits[0]
        shares = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found[answer] = float(sum(shares[i, token] for i, token in enumerate(target)))
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_share_of_likeliest_answers_is_that_of_single_passes(batch_size, gpt2):
    tokenizer, model = prepare_tokenizer(gpt2, None), GPT2LMHeadModel.from_pretrained(gpt2)
    made = rows(22)
    choices, seen = prepared(made, tokenizer), []
    found = choices.evaluate(model, tokenizer, batch_size, lambda done, of: seen.append((done, of)))
    scores = [by_hand(model, tokenizer, row) for row in made]
    expected = [max(x, key=x.get) == row["gold"] for x, row in zip(scores, made, strict=True)]
    assert found == {"choice_accuracy": sum(expected) / 22}
    assert 0 < sum(expected) < 22
    assert seen[-1] == (sum(map(len, scores)),) * 2


def test_an_answer_that_is_only_as_likely_is_not_right(gpt2):
    tokenizer, model = prepare_tokenizer(gpt2, None), GPT2LMHeadModel.from_pretrained(gpt2)
    made = [{"q": "w1 w2", "a": "w9", "gold": gold} for gold in ("w1", "w2")]
    choices = prepared(made, tokenizer)
    torch.nn.init.zeros_(model.transformer.wte.weight)
    assert choices.evaluate(model, tokenizer, 3) == {"choice_accuracy": 0.0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "w1 w2", "a": "w9", "gold": "w12"}, "row 1: .*'w12', among others .* found w1, w2"),
        ({"q": "w3 w12", "a": "w9", "gold": "w12"}, "found w12"),
        ({"q": "w1 w2", "a": "w9", "gold": None}, "expected a value in every row"),
        ({"q": "w1 w2", "a": "w9"}, "expected a column 'gold'"),
    ],
)
def test_rows_without_their_answer_are_refused(row, message, gpt2):
    made = [row, {"q": "w1 w2", "a": "w9", **({"gold": "w1"} if "gold" in row else {})}]
    with pytest.raises(DataError, match=message):
        prepared(made, prepare_tokenizer(gpt2, None))


def test_an_answer_that_does_not_fit_is_refused(gpt2):
    made = [{"q": "w1 w2", "a": "w9", "gold": "w1"}]
    with pytest.raises(DataError, match="max_length cuts the answers"):
        prepared(made, prepare_tokenizer(gpt2, None), template="w5 " * 40 + "{choice}")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"choices": CHOICES | {"template": "none"}}, "choice"),
        ({"choices": CHOICES | {"answers": ["w1"]}}, "at least 2"),
        ({"choices": CHOICES, "completion": None, "completion_template": "{a}"}, "name its column"),
    ],
)
def test_a_wrong_table_is_refused(task, message):
    with pytest.raises(ValidationError, match=message):
        CausalLMTask(**(TASK | task))


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("boolq", ["true", "false"]),
        ("social_i_qa", [f"answer{i}" for i in range(1, 6)]),
        ("arc_challenge", [f"answer{i}" for i in range(1, 6)]),
        ("piqa", ["solution1", "solution2"]),
        ("hellaswag", [f"ending{i}" for i in range(1, 5)]),
        ("winogrande", ["option1", "option2"]),
    ],
)
def test_real_rows_offer_their_own_answers(name, answers, real_data):
    with (real_data / name / "test.jsonl").open(encoding="utf-8") as file:
        data = Dataset.from_list([json.loads(next(file)) for _ in range(100)])
    template = "the correct answer is {choice}"
    table = {"answers": answers, "template": template, "reference": "answer"}
    task = CausalLMTask(
        kind="causal-lm", prompt="instruction", completion="output", choices=table, max_length=900
    )
    choices = prepare_choices(prepare_task(task, Splits(data, data, "")), data, byte_model()[1])
    assert isinstance(choices, Choices)
    assert sum(choices.right) == 100
    stated = [x.rpartition("format:")[2].count("/") + 1 for x in data["instruction"]]
    assert [list(choices.rows).count(i) for i in range(100)] == stated
