"""What a model writes after conversations: prompts, ends of turns, and what is no answer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig as ModelOptions
from transformers import LlamaConfig, LlamaForCausalLM

from fedexlora.data.config import ChatTask
from fedexlora.data.generation import prepare_generation
from fedexlora.data.load import Splits
from fedexlora.data.prompts import AnswerFrame
from fedexlora.data.task import prepare_task
from fedexlora.errors import DataError
from tests.data.chats import CHATS, EOS, FAMILIES, chat, chat_tokenizer, template
from tests.data.test_chat import chatml

ANSWERED = [x for x in CHATS if x[-1]["role"] == "assistant"]
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}
BLOCK = "<think>\\n\\n</think>\\n\\n"
THINKING = chatml(answer=f"{{{{- '{BLOCK}' + m.content + '<|im_end|>\\n' }}}}")
PLAIN = """
{%- for m in messages %}{{- m.role + ': ' + m.content + '\\nEND\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(chat_tokenizer("chatml")),
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
            max_position_embeddings=256,
            eos_token_id=None,
        )
    )


def prepared(model, tokenizer, chats=ANSWERED, columns=None, table=None, **options):
    rows = [
        {"messages": messages, **{key: values[i] for key, values in (columns or {}).items()}}
        for i, messages in enumerate(chats)
    ]
    generation = {"metrics": ("bleu",), "max_new_tokens": 12} | (table or {})
    rows = Dataset.from_list(rows)
    task = prepare_task(ChatTask(generation=generation, **options), Splits(rows, rows, ""))
    return prepare_generation(task, rows, tokenizer, model)


class Writes:
    """Has a model write some tokens, whatever it reads."""

    def __init__(self, model, tokens):
        self.model, self.tokens, self.step = model, tokens, 0

    def __enter__(self):
        self.hook = self.model.register_forward_hook(self.force)

    def __exit__(self, *_):
        self.hook.remove()

    def force(self, module, arguments, output):
        token = self.tokens[min(self.step, len(self.tokens) - 1)]
        self.step += 1
        output.logits[:, -1, :] = -1e4
        output.logits[:, -1, token] = 1e4
        return output


def scored(made, model, tokenizer, text, ends=()):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    with Writes(model, [*tokens, *ends]):
        return made.evaluate(model, tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("marked", [False, True])
def test_a_prompt_is_the_conversation_before_the_last_answer(family, marked, llama):
    tokenizer = chat_tokenizer(family, template(family, marked=marked))
    made = prepared(llama, tokenizer)
    assert len(made.prompts) == len(ANSWERED)
    for messages, prompt, reference in zip(ANSWERED, made.prompts, made.references, strict=True):
        asked = messages[:-1]
        written = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(prompt) == written
        assert reference == messages[-1]["content"]
    assert made.frame == AnswerFrame((), frozenset({tokenizer.convert_tokens_to_ids(ENDS[family])}))


def test_a_prompt_is_what_training_reads_before_the_answer(llama):
    tokenizer = chat_tokenizer("llama3", template("llama3"))
    made = prepared(llama, tokenizer)
    rows = Dataset.from_list([{"messages": x} for x in ANSWERED])
    trained = prepare_task(ChatTask(), Splits(rows, rows, "")).tokenize(rows, tokenizer)
    for prompt, row in zip(made.prompts, trained, strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][len(prompt) - 1] == -100
        assert row["labels"][len(prompt)] == row["input_ids"][len(prompt)]
    assert made.notes == []


def test_conversations_with_equal_prompts_are_one_with_several_references(llama):
    tokenizer = chat_tokenizer("chatml", template("chatml"))
    chats = [chat("u: one", "a: two"), chat("u: three", "a: it"), chat("u: one", "a: too")]
    made = prepared(llama, tokenizer, chats)
    assert made.grouped == [["two", "too"], ["it"]]
    assert list(made.prompt_of_row) == [0, 1, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_templates_end_of_a_turn_ends_a_text_whatever_the_files_name(family, llama):
    """Neither the model's files nor the tokenizer's end token say it, as in many a base model."""
    tokenizer = chat_tokenizer(family, template(family).replace("eos_token", f"'{EOS[family]}'"))
    tokenizer.eos_token = "[INST]"
    end = tokenizer.convert_tokens_to_ids(ENDS[family])
    made = prepared(llama, tokenizer, [chat("u: one", "a: 6 x 7 is 42")] * 2)
    found = scored(made, llama, tokenizer, "6 x 7 is 42", [end, 70])
    assert found["generation/unfinished"] == 0
    assert found["bleu"] == pytest.approx(100)


def test_the_end_tokens_of_the_models_files_end_a_text_too(llama, monkeypatch):
    tokenizer = chat_tokenizer("chatml", template("chatml"))
    other = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    monkeypatch.setattr(llama, "generation_config", ModelOptions(eos_token_id=[other, 3]))
    made = prepared(llama, tokenizer, [chat("u: one", "a: 6 x 7 is 42")])
    found = scored(made, llama, tokenizer, "6 x 7 is 42", [other, 70])
    assert (found["bleu"], found["generation/unfinished"]) == (pytest.approx(100), 0)


def test_a_text_that_a_template_ends_answers_with_ends_one(llama):
    tokenizer = chat_tokenizer("chatml", PLAIN)
    chats = [chat("u: one", "a: the END"), chat("u: END", "a: 1 2 3 4")]
    made = prepared(llama, tokenizer, chats, table={"max_new_tokens": 20})
    assert made.frame == AnswerFrame((), frozenset(), ("END",))
    found = scored(made, llama, tokenizer, "1 2 3 4\nEND\nuser: and more of it")
    assert found["generation/unfinished"] == 0
    written = prepared(llama, tokenizer, chats[1:], table={"max_new_tokens": 20})
    assert scored(written, llama, tokenizer, "1 2 3 4\nEND\n")["bleu"] == pytest.approx(100)


def test_what_a_template_writes_before_an_answer_is_no_part_of_the_text(llama):
    """As Qwen3's, which writes an empty block of reasoning that it does not prompt with."""
    tokenizer = chat_tokenizer("chatml", THINKING)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # A stop string of the recipe is looked for in the answer, and not in what stands before it.
    table = {"metrics": ("bleu", "gsm8k"), "reference": "gold", "stop": ("\n\n",)}
    table |= {"max_new_tokens": 60}
    gold = "so it is #### 42"
    chats = [chat("u: one", f"a: {gold}"), chat("s: so", "u: one", "a: think")]
    made = prepared(llama, tokenizer, chats, {"gold": [gold] * 2}, table)
    assert made.frame.openings == ("<think>\n\n</think>",)
    assert tokenizer.decode(made.prompts[0]).endswith("<|im_start|>assistant\n")
    (note,) = made.notes
    assert note.startswith(r"the template writes '<think>\n\n</think>' before an answer: ")
    for before in ("<think>\n\n</think>\n\n", "<think>\n\n</think>", ""):
        for after, ends in (("", [end]), ("\n\n#### 7", [])):
            found = scored(made, llama, tokenizer, before + gold + after, ends)
            assert found["bleu"] == pytest.approx(100)
            assert found["gsm8k"] == 1.0
            assert found["generation/unfinished"] == 0
    reasoned = scored(made, llama, tokenizer, "<think>\n#### 7\n</think>", [end])
    assert reasoned["gsm8k"] == 0.0


def test_a_text_without_an_end_is_bounded_and_counted_and_so_is_one_without_an_answer(llama):
    tokenizer = chat_tokenizer("chatml", template("chatml"))
    chats = [chat("u: one", "a: #### 2"), chat("u: two", "a: #### 3"), chat("u: one", "a: #### 4")]
    made = prepared(llama, tokenizer, chats, table={"metrics": ("gsm8k",), "max_new_tokens": 5})
    found = scored(made, llama, tokenizer, "no idea, none at all")
    assert found == {"gsm8k": 0.0, "gsm8k/unparsed": 3.0, "generation/unfinished": 2.0}


def test_a_long_prompt_keeps_the_token_that_begins_it_and_its_end(llama):
    tokenizer = chat_tokenizer("llama3", template("llama3"))
    turns = chat("s: be brief", "u: " + "long " * 30, "a: hi")
    made = prepared(llama, tokenizer, [turns, turns[1:]], max_length=40)
    for prompt in made.prompts:
        assert len(prompt) == 40
        assert prompt[0] == tokenizer.bos_token_id
        assert tokenizer.decode(prompt).endswith("assistant<|end_header_id|>\n\n")
    said = "2 of 2 prompts lose their beginning to task.max_length, 40, with it the system's text"
    assert made.notes == [f"{said} and the first turns"]


def test_a_prompt_whose_last_token_training_does_not_have_is_said(llama):
    joined = PLAIN.replace("'assistant: '", "'assistant: t'").replace(
        "m.role + ': '", "m.role + ': ' + ('t' if m.role == 'assistant' else '')"
    )
    made = prepared(llama, chat_tokenizer("chatml", joined), [chat("u: one", "a: he")])
    assert made.notes[0].startswith("in 1 of 1 rows the end of the prompt and the beginning of")


@pytest.mark.parametrize(
    ("chats", "options", "message"),
    [
        (
            [CHATS[0], chat("u: a", "a: b", "u: c")],
            {},
            "row 2: expected the assistant's turn at the end, found the user's",
        ),
        ([CHATS[0]], {"table": {"reference": "gold"}}, "expected a column 'gold'"),
        ([CHATS[0]], {"table": {"metrics": ("gsm8k",)}}, "right answers that cannot be read"),
        ([CHATS[0]], {"table": {"max_new_tokens": 255}}, "max_new_tokens: expected at most 2"),
        (
            [CHATS[0]],
            {"chat_template": chatml(prompt="{{- '<|im_start|>assistant\\n<think>' }}")},
            "what the template prompts for this answer with is not what",
        ),
        (
            [CHATS[0]],
            {"chat_template": chatml(answer="{{- m.content | replace('7', '') + '<|im_end|>' }}")},
            "message 2: where an answer begins and ends cannot be told, .*'Answer7Text'",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_run(chats, options, message, llama):
    tokenizer = chat_tokenizer("chatml", template("chatml"))
    with pytest.raises(DataError, match=message):
        prepared(llama, tokenizer, chats, **options)
