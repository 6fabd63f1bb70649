import math

import pytest
import torch
from datasets import Dataset

from fedexlora.data.config import CausalLMTask, DataConfig
from fedexlora.data.load import load_splits
from fedexlora.data.task import prepare_task
from fedexlora.data.tokenizer import prepare_tokenizer
from fedexlora.errors import DataError
from tests.data.loading import model_for

END, NONE = 0, -100
PAIRS = [
    {"p": " ".join(f"w{(i + j) % 19 + 1}" for j in range(1 + i % 9)), "c": "w3 " * (i % 5)}
    for i in range(13)
]
PROMPTED = CausalLMTask(prompt="p", completion="c")


def ids(words):
    """The tiny tokenizer gives word ``w{i}`` the number ``i + 1``, after the end token's 0."""
    return [int(word[1:]) + 1 for word in words.split()]


def tokenize(config, splits, rows, path):
    task, tokenizer = prepare_task(config, splits(rows)), prepare_tokenizer(path, None)
    return task, tokenizer, task.tokenize(Dataset.from_list(rows), tokenizer)


def row(config, splits, given, path):
    found = tokenize(config, splits, [given], path)[2][0]
    return found["input_ids"], found["labels"]


def test_the_prompt_is_masked_and_the_completion_ends(splits, gpt2):
    tokens, labels = row(PROMPTED, splits, {"p": "w1 w2 w3", "c": "w4 w5"}, gpt2)
    assert tokens == [*ids("w1 w2 w3 w4 w5"), END]
    assert labels == [NONE, NONE, NONE, *ids("w4 w5"), END]


def test_a_template_surrounds_the_prompt(splits, gpt2):
    config = PROMPTED.model_copy(update={"prompt_template": "w9 {prompt} w8 "})
    tokens, labels = row(config, splits, {"p": "w1", "c": "w4"}, gpt2)
    assert tokens == [*ids("w9 w1 w8 w4"), END]
    assert labels == [NONE, NONE, NONE, *ids("w4"), END]


def test_every_token_of_a_text_is_a_target(splits, gpt2):
    tokens, labels = row(CausalLMTask(text="p"), splits, {"p": "w1 w2"}, gpt2)
    assert tokens == labels == [*ids("w1 w2"), END]


@pytest.mark.parametrize(
    ("max_length", "expected", "masked"),
    [(7, "w0 w1 w2 w3 w4 w5", 4), (5, "w2 w3 w4 w5", 2), (4, "w3 w4 w5", 1)],
)
def test_a_long_prompt_loses_its_beginning(max_length, expected, masked, splits, gpt2):
    config = PROMPTED.model_copy(update={"max_length": max_length})
    given = {"p": "w0 w1 w2 w3", "c": "w4 w5"}
    tokens, labels = row(config, splits, given, gpt2)
    assert tokens == [*ids(expected), END]
    assert labels[:masked] == [NONE] * masked
    assert labels[masked:] == tokens[masked:]
    assert labels[-3:] == [*ids("w4 w5"), END]


def test_a_long_completion_or_text_loses_its_end(splits, gpt2):
    config = PROMPTED.model_copy(update={"max_length": 3})
    assert row(config, splits, {"p": "w1", "c": "w2 w3 w4 w5"}, gpt2)[1] == ids("w2 w3 w4")
    config = CausalLMTask(text="p", max_length=3)
    assert row(config, splits, {"p": "w1 w2 w3 w4"}, gpt2)[0] == ids("w1 w2 w3")


def test_a_tokenizer_that_begins_texts_keeps_doing_so(splits, bert):
    task = prepare_task(PROMPTED.model_copy(update={"max_length": 5}), splits(PAIRS))
    tokenizer = prepare_tokenizer(bert, None)
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    rows = Dataset.from_list([{"p": "w1 w2 w3 w4", "c": "w5"}])
    found = task.tokenize(rows, tokenizer)[0]
    words = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert words == ["[CLS]", "w3", "w4", "w5", "[SEP]"]
    assert found["labels"][:3] == [NONE] * 3


def test_rows_without_a_target_are_counted(splits, gpt2):
    rows = [{"t": "w1"}, {"t": ""}, {"t": "w2"}, {"t": " "}]
    with pytest.raises(DataError, match="found none in 2 of 4, the first is row 2"):
        tokenize(CausalLMTask(text="t"), splits, rows, gpt2)


def test_a_batch_masks_its_padding(splits, gpt2):
    rows = [{"p": "w1 w2", "c": "w3"}, {"p": "w1", "c": ""}]
    task, tokenizer, tokenized = tokenize(PROMPTED, splits, rows, gpt2)
    batch = task.collator(tokenizer)(list(tokenized))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [[NONE, NONE, *ids("w3"), END], [NONE, END, NONE, NONE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def naive_loss(model, tokenized):
    """Every target's loss, a row at a time, without padding, in float64."""
    model, losses = model.double().eval(), []
    for found in tokenized:
        with torch.no_grad():
            logits = model(torch.tensor([found["input_ids"]])).logits[0]
        chances = logits.log_softmax(dim=-1)
        for place, target in enumerate(found["labels"]):
            if target != NONE and place > 0:
                losses.append(-chances[place - 1, target].item())
    model.float()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("config", [PROMPTED, CausalLMTask(text="p")])
def test_the_loss_weighs_every_token_the_same_in_any_batch(config, splits, gpt2):
    task, tokenizer, tokenized = tokenize(config, splits, PAIRS, gpt2)
    model = model_for(task, gpt2, tokenizer.pad_token_id)
    expected = naive_loss(model, tokenized)
    for batch_size in (1, 2, 5, 13):
        measured = task.evaluate(model, tokenized, tokenizer, batch_size)
        assert measured["loss"] == pytest.approx(expected, rel=1e-5)
        assert measured["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_batches_of_unequal_length_are_not_averaged_by_batch(splits, gpt2):
    rows = [{"t": "w1 " * 20}, {"t": "w2 w7"}]
    task, tokenizer, tokenized = tokenize(CausalLMTask(text="t"), splits, rows, gpt2)
    model = model_for(task, gpt2)
    apart = [task.evaluate(model, tokenized.select([i]), tokenizer, 1)["loss"] for i in (0, 1)]
    together = task.evaluate(model, tokenized, tokenizer, 1)["loss"]
    assert together == pytest.approx((20 * apart[0] + 2 * apart[1]) / 22)
    assert together != pytest.approx(sum(apart) / 2, rel=1e-2)


def test_perplexity_is_left_out_if_not_asked_for(splits, gpt2):
    config = PROMPTED.model_copy(update={"metrics": ("loss",)})
    task, tokenizer, tokenized = tokenize(config, splits, PAIRS, gpt2)
    assert set(task.evaluate(model_for(task, gpt2), tokenized, tokenizer, 4)) == {"loss"}
    assert (task.peft_task_type, task.partition_column) == ("CAUSAL_LM", None)


def test_a_tokenizer_without_padding_pads_with_its_end_token(gpt2, splits):
    tokenizer = prepare_tokenizer(gpt2, None)
    model = model_for(prepare_task(PROMPTED, splits(PAIRS)), gpt2, tokenizer.pad_token_id)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<end>", "right")
    assert model.config.pad_token_id == END
    assert model.dtype == torch.float32


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(gpt2, tmp_path):
    tokenizer = prepare_tokenizer(gpt2, None)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="a padding, end or unknown token, found none"):
        prepare_tokenizer(str(tmp_path), None)


def test_a_tokenizer_that_is_not_there_is_named():
    with pytest.raises(DataError, match=r"cannot load the tokenizer of '\./none'"):
        prepare_tokenizer("./none", None)


def test_a_tokenizer_without_an_end_token_is_refused(splits, bert):
    with pytest.raises(DataError, match="expected an end token for causal-lm"):
        tokenize(PROMPTED, splits, PAIRS, bert)


def no_value(place, row):
    found = f"found none in 1 row(s), the first is row {row}"
    return f"{place}: expected a value in every row, {found}"


def test_all_faults_are_listed(splits):
    train, validation = [{"p": "w1", "c": None}], [{"p": 1.5}]
    with pytest.raises(DataError) as caught:
        prepare_task(PROMPTED, splits([*train, {"p": "w", "c": "w"}], validation))
    assert list(caught.value.faults) == [
        "validation: expected a column 'c', found p",
        no_value("training, column 'c'", 1),
        "validation, column 'p': expected text, found float64",
    ]


def test_real_data_fit_their_tasks(real_data, gpt2):
    splits = load_splits(DataConfig(source=str(real_data / "shakespeare")), 0)
    task = prepare_task(CausalLMTask(text="text", max_length=32), splits)
    tokenized = task.tokenize(splits.validation, prepare_tokenizer(gpt2, None))
    assert len(tokenized) == 2596
    assert max(tokenized["length"][:]) == 32
