"""Chat: the targets are the assistant's turns, and what cannot be so is refused by row."""

import math
from itertools import groupby

import pytest
import torch
from datasets import Dataset, Features, Sequence, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from fedexlora.data.config import ChatTask
from fedexlora.data.cuts import CutRows
from fedexlora.data.load import Splits
from fedexlora.data.task import prepare_task
from fedexlora.errors import DataError
from tests.data.chats import CHATS, FAMILIES, chat, chat_tokenizer, generated, template

NONE = -100
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
ANSWERS = TEXTS.filter(str.strip)
_TOKENIZERS = {family: chat_tokenizer(family, template(family)) for family in FAMILIES}


def tokenize(chats, tokenizer, **options):
    rows = Dataset.from_list([{"messages": messages} for messages in chats])
    task = prepare_task(ChatTask(**options), _splits(rows))
    return task.tokenize(rows, tokenizer)


def _splits(rows):
    return Splits(rows, rows, "")


def faults(chats, tokenizer, **options):
    with pytest.raises(DataError) as caught:
        tokenize(chats, tokenizer, **options)
    return caught.value.faults or (caught.value.summary,)


def targets(row, tokenizer):
    """The text of every run of targets."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    assert all(label in (NONE, token) for token, label in pairs)
    runs = groupby(pairs, key=lambda x: x[1] != NONE)
    return [tokenizer.decode([x for x, _ in run]) for target, run in runs if target]


def masked_by_transformers(messages, tokenizer, source):
    found = tokenizer.apply_chat_template(
        messages,
        chat_template=source,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask = zip(found["input_ids"], found["assistant_masks"], strict=True)
    return found["input_ids"], [token if target else NONE for token, target in mask]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("marked", [False, True])
def test_the_mask_is_the_one_of_the_generation_marks_token_for_token(family, marked):
    """TRL takes its mask for assistant-only loss from there; see also `test_chat_trl`."""
    tokenizer = chat_tokenizer(family, template(family, marked=marked))
    found = tokenize(CHATS, tokenizer)
    for messages, row in zip(CHATS, found, strict=True):
        expected = masked_by_transformers(messages, tokenizer, template(family, marked=True))
        assert (row["input_ids"], row["labels"]) == expected
        assert row["attention_mask"] == [1] * len(row["labels"])


@st.composite
def conversations(draw):
    """Any order of turns that begins with a user's, perhaps after a system's."""
    turns = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for role in ["user", *draw(st.lists(st.sampled_from(["user", "assistant", "tool"])))]:
        content = draw(ANSWERS if role == "assistant" else TEXTS)
        turns.append({"role": role, "content": content})
    return [*turns, {"role": "assistant", "content": draw(ANSWERS)}]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_targets_are_the_answers_and_their_ends_and_nothing_else(family, data):
    messages = data.draw(conversations())
    tokenizer = _TOKENIZERS[family]
    (row,) = tokenize([messages], tokenizer)
    answers = [x["content"] for x in messages if x["role"] == "assistant"]
    assert "".join(targets(row, tokenizer)) == "".join(generated(family, x) for x in answers)


def test_a_system_and_a_tool_are_read_and_no_target():
    tokenizer = _TOKENIZERS["llama3"]
    (row,) = tokenize([chat("s: be", "u: one", "a: call", "t: tool says", "a: end")], tokenizer)
    assert targets(row, tokenizer) == ["call<|eot_id|>", "end<|eot_id|>"]
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith("<|begin_of_text|><|start_header_id|>system")
    assert "tool says" in text


def test_sharegpt_is_the_same_conversation():
    tokenizer = _TOKENIZERS["chatml"]
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    rows = [
        {"conversations": [{"from": names[x["role"]], "value": x["content"]} for x in messages]}
        for messages in CHATS
    ]
    rows = Dataset.from_list(rows)
    task = prepare_task(ChatTask(messages="conversations"), _splits(rows))
    assert list(task.tokenize(rows, tokenizer)) == list(tokenize(CHATS, tokenizer))
    with pytest.raises(DataError, match=r'found conversations; .* task.messages = "conversations"'):
        prepare_task(ChatTask(), _splits(rows))


def test_messages_may_be_stored_by_key():
    features = Features({"messages": Sequence({"from": Value("string"), "value": Value("string")})})
    stored = {"messages": [{"from": ["human", "gpt"], "value": ["one", "two"]}]}
    rows = Dataset.from_dict(stored, features=features)
    task = prepare_task(ChatTask(), _splits(rows))
    expected = tokenize([chat("u: one", "a: two")], _TOKENIZERS["chatml"])
    assert list(task.tokenize(rows, _TOKENIZERS["chatml"])) == list(expected)


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (chat("a: hello", "a: me"), "expected a turn of the user, found none"),
        (chat("s: hello", "u: me"), "expected a turn of the assistant, found none"),
        (chat("a: hello", "u: me"), "message 1: expected a turn before the assistant's, found"),
        (chat("u: hello", "bot: me"), r"message 2: `role`: expected one of system, .*found 'bot'"),
        (chat("u: hello", "a:  \n"), "message 2: expected an assistant's answer, found an empty"),
        ([{"role": "user", "content": None}], "message 1: `content`: expected text, found none"),
        ([{"content": "x"}], "message 1: `role`: expected one of .*; found none"),
        ([], r"expected a list of messages, found \[\]"),
        (
            [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}],
            "message 1: `tool_calls` is not read; write the call into the content",
        ),
        ([{"from": "function_call", "value": "x"}], "message 1: `from`: expected one of"),
    ],
)
def test_a_conversation_that_is_none_is_named_by_row_and_message(messages, fault):
    found = faults([CHATS[0], CHATS[1], messages], _TOKENIZERS["chatml"])
    assert len(found) == 2  # the same rows are training and validation rows here
    with pytest.raises(DataError, match=f"training, row 3, {fault}"):
        tokenize([CHATS[0], CHATS[1], messages], _TOKENIZERS["chatml"])


@pytest.mark.parametrize("value", ["user: hello", 5, [1], [{"role": "user", "content": [5]}]])
def test_what_is_no_text_in_messages_is_named(value):
    rows = Dataset.from_list([{"messages": value}])
    with pytest.raises(DataError, match="training, row 1, .*expected .*, found "):
        prepare_task(ChatTask(), _splits(rows))


def test_of_many_faults_the_first_are_shown_and_all_are_counted():
    found = faults([chat("u: one")] * 50, _TOKENIZERS["chatml"])
    assert len(found) == 22
    assert found[10] == "... and 40 more"


MULTI = chat("u: one", "a: first", "u: two", "a: second")
ANSWER, PROMPT = "{{- m.content + '<|im_end|>\\n' }}", "{{- '<|im_start|>assistant\\n' }}"


LATE_END = """
{%- for m in messages %}
    {{- ('' if loop.first else '<|im_end|>') + m.role + ': ' + m.content }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_end|>assistant: ' }}{%- endif %}"""


def chatml(**changed):
    """The template with another ``answer``, another ``prompt`` for one, or another's ``turn``."""
    source = template("chatml")
    assert source.count(ANSWER) == 2
    assert source.count(PROMPT) == 1
    source = source.replace(PROMPT, changed.get("prompt", PROMPT))
    head, answer, rest = source.partition(ANSWER)
    return head + changed.get("answer", answer) + rest.replace(ANSWER, changed.get("turn", ANSWER))


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (
            chatml(answer="{{- m.content[:2] + '<|im_end|>\\n' }}"),
            "message 2: the template cuts the answer off",
        ),
        (
            chatml(answer="{{- m.content + '\\n' }}"),
            "message 2: the template writes nothing that ends the answer",
        ),
        (  # an end that is a part of the next turn
            LATE_END,
            "message 2: the template writes nothing that ends the answer",
        ),
        (  # earlier reasoning is stripped
            chatml(answer="{{- ('(so) ' if loop.last else '') + m.content + '<|im_end|>\\n' }}"),
            "message 2: the template writes the conversation up to here otherwise",
        ),
        (
            chatml(prompt="{{- '<|im_start|>assistant\\n<think>' }}"),
            "message 2: what the template prompts for this answer with is not what",
        ),
        (
            chatml(prompt=""),
            "message 2: the template writes '<.im_start.>assistant' before the answer, but not",
        ),
        (
            chatml(turn="{{- '<|im_end|>\\n' }}"),
            "message 1: the template does not write the text of the user's turn",
        ),
        (  # its own message, with what terminals obey in it
            "{{ raise_exception('no \x1b[31m' + 'x' * 900) }}",
            r"the template raises TemplateError: 'no \\x1b\[31mx+\.\.\.x+'$",
        ),
        ("{{ messages[0].nothing.more }}", "the template raises UndefinedError: "),
        ("{{ [].__class__.__base__() }}", "the template raises SecurityError: "),
        ("{% if %}", "the template raises TemplateSyntaxError: "),
    ],
)
def test_a_template_that_does_not_write_the_answers_as_they_are_generated_is_refused(source, fault):
    found = faults([MULTI, MULTI], chat_tokenizer("chatml"), chat_template=source)
    assert [x.partition(":")[0] for x in found] == ["row 1", "row 2"]
    with pytest.raises(DataError, match=f"row 2: {fault}"):
        tokenize([MULTI, MULTI], chat_tokenizer("chatml"), chat_template=source)


def test_a_template_that_strips_reasoning_serves_conversations_of_one_answer():
    stripped = "(m.content if loop.last else m.content[:3])"
    tokenizer = chat_tokenizer("chatml", chatml(answer=f"{{{{- {stripped} + '<|im_end|>\\n' }}}}"))
    (row,) = tokenize([MULTI[:2]], tokenizer)
    assert targets(row, tokenizer) == ["first<|im_end|>\n"]


def test_an_end_token_after_the_conversation_is_part_of_the_last_turn():
    source = template("llama3").replace("{%- endif %}\n{%- if add", "{%- endif %}{%- if add")
    source += "{%- if not add_generation_prompt %}{{- '</s>' }}{%- endif %}"
    tokenizer = chat_tokenizer("llama3", source)
    tokenizer.eos_token = "</s>"
    (row,) = tokenize([MULTI], tokenizer)
    assert targets(row, tokenizer) == ["first<|eot_id|>", "second<|eot_id|></s>"]


def marked(body):
    """A template that writes the assistant's turns otherwise, with marks."""
    return (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        + body
        + "{%- else %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )


HEAD = "{{- '<|im_start|>assistant\\n' }}"
ON, OFF = "{%- generation -%}", "{%- endgeneration -%}"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (
            HEAD + ON + "{{- m.content }}" + OFF + "{{- '<|im_end|>\\n' }}",
            r"'<.im_end.>\\n' is a part of an answer, but not marked",
        ),
        (
            ON + HEAD + "{{- m.content + '<|im_end|>\\n' }}" + OFF,
            r"'<.im_start.>assistant\\n' is marked, but of no answer",
        ),
        (
            HEAD + "{{- m.content[:1] }}" + ON + "{{- m.content[1:] + '<|im_end|>\\n' }}" + OFF,
            "'f' is a part of an answer, but not marked",
        ),
        (
            HEAD + "{{- m.content + '<|im_end|>\\n' }}" + ON + "{{- '' }}" + OFF,
            r"'first<.im_end.>\\n' is a part of an answer, but not marked",
        ),
    ],
)
def test_marks_that_are_not_the_answers_are_refused(body, fault):
    with pytest.raises(DataError, match=f"correct its marks, .*\n  row 1: {fault}"):
        tokenize([MULTI], chat_tokenizer("chatml", marked(body)))


def test_marks_may_differ_in_white_space_and_then_count():
    body = HEAD + ON + "{{- m.content + '<|im_end|>' }}" + OFF + "{{- '\\n' }}"
    tokenizer = chat_tokenizer("chatml", marked(body))
    (row,) = tokenize([MULTI], tokenizer)
    assert targets(row, tokenizer) == ["first<|im_end|>", "second<|im_end|>"]


def test_a_tokenizer_without_a_template_is_refused_with_the_key_that_gives_one():
    tokenizer = chat_tokenizer("chatml")
    with pytest.raises(DataError, match=r'expected a chat template, found none; .*"FILE\.jinja"'):
        tokenize(CHATS, tokenizer)
    given = tokenize(CHATS, tokenizer, chat_template=template("chatml"))
    assert list(given) == list(tokenize(CHATS, _TOKENIZERS["chatml"]))


def test_a_tokenizer_that_does_not_say_where_its_tokens_are_is_refused():
    with pytest.raises(DataError, match=r"\(a tokenizer.json\), found ByT5Tokenizer"):
        tokenize(CHATS, ByT5Tokenizer(), chat_template=template("chatml"))


def test_a_template_that_writes_the_day_is_refused_or_given_one():
    today = "{{- strftime_now('%d %b %Y') }}"
    with pytest.raises(DataError, match="writes the day on which it is used"):
        tokenize(CHATS, chat_tokenizer("chatml", today + template("chatml")))
    dated = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%Y') %}"
    source = dated + "{%- endif %}{{- date_string + '\\n' }}" + template("chatml")
    tokenizer = chat_tokenizer("chatml", source)
    (row,) = tokenize([MULTI], tokenizer)
    assert tokenizer.decode(row["input_ids"]).startswith("26 Jul 2024\n<|im_start|>user")


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("none.jinja", "expected a Jinja template, .*found 'none.jinja'"),
        ("{{" + " " * 100_000, "at most 100,000 characters, found 100,002"),
    ],
)
def test_what_is_no_template_is_refused(given, fault):
    with pytest.raises(ValidationError, match=fault):
        ChatTask(chat_template=given)


def test_a_long_conversation_loses_its_end_and_that_is_counted():
    tokenizer = _TOKENIZERS["chatml"]
    (whole,) = tokenize([MULTI], tokenizer)
    last = max(i for i, x in enumerate(whole["labels"]) if x != NONE) + 1
    for length in (last - 1, last - 2):
        found = tokenize([MULTI, MULTI[:2]], tokenizer, max_length=length)
        assert found[0]["input_ids"] == whole["input_ids"][:length]
        assert found[0]["labels"] == whole["labels"][:length]
        assert CutRows.of(found) == CutRows(rows=2, cut=1, answer_end=1)
    (tail,) = tokenize([[*MULTI, *chat("u: more")]], tokenizer, max_length=last)
    assert (tail["labels"], tail["cut"]) == (whole["labels"], 1)


def test_rows_whose_answers_are_all_cut_are_counted():
    chats = [chat("u: hello", "a: hi"), chat("u: " + "long " * 20, "a: hi")]
    with pytest.raises(DataError, match="found none in 1 of 2, the first is row 2; .*max_length"):
        tokenize(chats, _TOKENIZERS["chatml"], max_length=40)


def test_the_end_token_is_a_target_and_padding_is_not_though_they_are_one_token():
    tokenizer = _TOKENIZERS["llama3"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = Dataset.from_list([{"messages": CHATS[0]}, {"messages": MULTI}])
    task = prepare_task(ChatTask(), _splits(rows))
    tokenized = task.tokenize(rows, tokenizer)
    batch = task.collator(tokenizer)(list(tokenized))
    ends = [(x == tokenizer.eos_token_id).sum().item() for x in batch["labels"]]
    assert ends == [1, 2]
    assert batch["attention_mask"].sum(1).tolist() == tokenized["length"][:]


def test_the_loss_is_the_mean_over_the_assistants_tokens():
    tokenizer = _TOKENIZERS["mistral"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
            initializer_range=0.5,
        )
    )
    rows = Dataset.from_list([{"messages": x} for x in CHATS])
    task = prepare_task(ChatTask(), _splits(rows))
    tokenized = task.tokenize(rows, tokenizer)
    losses = []
    for row in tokenized:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        pairs = zip(logits[:-1], row["labels"][1:], strict=True)
        losses += [-chances[target].item() for chances, target in pairs if target != NONE]
    measured = task.evaluate(model, tokenized, tokenizer, 2)
    assert measured["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
    assert set(measured) == {"loss", "perplexity"}
