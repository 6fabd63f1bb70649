"""Rows against the model: positions, tokens, numbers."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedexlora.data.capacity import check_capacity, check_config, positions
from fedexlora.data.config import CausalLMTask, ClassificationTask, RegressionTask
from fedexlora.data.cuts import CutRows
from fedexlora.data.task import prepare_task
from fedexlora.data.tokenizer import prepare_tokenizer
from fedexlora.errors import DataError

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}


def roberta():
    config = RobertaConfig(**SMALL, intermediate_size=8, max_position_embeddings=34, pad_token_id=1)
    return RobertaForSequenceClassification(config)


def bert_model():
    config = BertConfig(**SMALL, intermediate_size=8, max_position_embeddings=33)
    return BertForSequenceClassification(config)


def opt():
    config = OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=31)
    return OPTForCausalLM(config)


def gpt2_model():
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=30, vocab_size=30))


def llama():
    config = LlamaConfig(**SMALL, intermediate_size=8, max_position_embeddings=29)
    return LlamaForCausalLM(config)


def bloom():
    return BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=30))


@pytest.mark.parametrize(
    ("make", "expected"),
    [(roberta, 32), (bert_model, 33), (opt, 31), (gpt2_model, 30), (llama, 29), (bloom, None)],
)
def test_the_longest_row_is_the_longest_that_the_model_computes(make, expected):
    model = make().eval()
    assert positions(model) == expected
    longest = expected or 60
    with torch.no_grad():
        assert model(torch.full((1, longest), 5)).logits.isfinite().all()
        if expected is not None and make is not llama:  # rotary positions have no table
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, longest + 1), 5))


def check(task, model, tokenizer, rows, half=False):
    tokenized = prepare_task(task, rows).tokenize(rows.train, tokenizer)
    check_capacity(task, model, tokenizer, {"training": tokenized}, half=half)


def test_a_row_may_be_as_long_as_the_model_reads(bert, splits):
    tokenizer = prepare_tokenizer(bert, None)
    rows = splits([{"a": "w1", "label": x} for x in "xy"])
    check(ClassificationTask(text="a", max_length=32), roberta(), tokenizer, rows)
    with pytest.raises(DataError, match="task.max_length: expected at most 32, .*; found 33"):
        check(ClassificationTask(text="a", max_length=33), roberta(), tokenizer, rows)


def test_what_the_configuration_states_is_checked_before_a_model_is_loaded(gpt2):
    tokenizer = prepare_tokenizer(gpt2, None)
    config = gpt2_model().config
    check_config(CausalLMTask(text="t", max_length=30), None, config, tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    config.vocab_size = 21
    with pytest.raises(DataError) as caught:
        check_config(CausalLMTask(text="t", max_length=31), None, config, tokenizer)
    length, padding = caught.value.faults
    assert "expected at most 30, the positions that the model has; found 31" in length
    assert "pads with '[PAD]', id 21, but the model has 21 embeddings" in padding


def test_a_trained_head_of_another_size_is_refused(bert):
    tokenizer, config = prepare_tokenizer(bert, None), bert_model().config
    task = ClassificationTask(text="a", max_length=8)
    check_config(task, 5, config, tokenizer)
    config.architectures = ["BertForSequenceClassification"]
    check_config(task, 2, config, tokenizer)
    with pytest.raises(
        DataError, match=r"trained head with 2 output\(s\), and the class.* needs 5"
    ):
        check_config(task, 5, config, tokenizer)


def test_tokens_without_an_embedding_are_named_with_their_rows(gpt2, splits):
    tokenizer = prepare_tokenizer(gpt2, None)
    tokenizer.add_tokens(["<tool>", "<call>", "<never>"])
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=21)
    )
    task = CausalLMTask(text="t", max_length=16)
    fine = splits([{"t": "w1"}])
    check(task, model, tokenizer, fine)
    rows = splits([{"t": "w1"}, {"t": "<tool> w1 <tool>"}, {"t": "<call> <tool>"}])
    with pytest.raises(DataError) as caught:
        check(task, model, tokenizer, rows)
    start = "training: the model has 21 embeddings, and none of the token "
    assert [fault.partition(";")[0] for fault in caught.value.faults] == [
        f"{start}'<tool>', id 21, which 2 row(s) hold, the first is row 2",
        f"{start}'<call>', id 22, which 1 row(s) hold, the first is row 3",
    ]


def test_kinds_of_tokens_that_a_model_does_not_know_are_refused(bert, splits):
    tokenizer = prepare_tokenizer(bert, None)
    rows = splits([{"a": "w1", "b": "w2", "label": x} for x in "xy"])
    config = BertConfig(**SMALL, intermediate_size=8, type_vocab_size=1)
    model = BertForSequenceClassification(config)
    check(ClassificationTask(text="a", max_length=8), model, tokenizer, rows)
    with pytest.raises(DataError, match="the tokenizer makes 2, the model knows 1"):
        check(ClassificationTask(text=("a", "b"), max_length=8), model, tokenizer, rows)


def test_labels_are_numbers_of_the_arithmetic(bert, splits):
    tokenizer, model = prepare_tokenizer(bert, None), roberta()
    rows = splits([{"a": "w1", "label": x} for x in (1.0, -7e4, 2.0)])
    task = RegressionTask(text="a", max_length=8)
    check(task, model, tokenizer, rows)
    with pytest.raises(DataError, match=r"up to 65504.*found -70000 in row 2"):
        check(task, model, tokenizer, rows, half=True)


def test_cut_rows_are_counted_by_what_they_lost(gpt2, splits):
    tokenizer = prepare_tokenizer(gpt2, None)
    rows = [
        {"p": "w1", "c": "w2"},
        {"p": "w1", "c": "w2 w3 w4"},
        {"p": "w1 w2 w3 w4", "c": "w2"},
        {"p": "w1", "c": "w2 w3 w4 w5 w6 w7"},
        {"p": "w1 " * 9, "c": "w2 " * 9},
    ]
    task = CausalLMTask(prompt="p", completion="c", max_length=5)
    found = prepare_task(task, splits(rows)).tokenize(Dataset.from_list(rows), tokenizer)
    assert found["cut"][:] == [0, 0, 2, 3, 3]
    assert CutRows.of(found) == CutRows(rows=5, cut=3, answer_end=2)
    note = CutRows.of(found).note("training", 5)
    assert note.startswith("training: task.max_length = 5 cuts 3 of 5 rows, 2 of them the end of")
    whole = found.filter(lambda row: row["cut"] == 0)
    assert CutRows.of(whole).note("training", 5) is None


@pytest.mark.parametrize("text", ["a", ("a", "b")])
def test_texts_that_lose_tokens_are_counted(text, bert, splits):
    tokenizer = prepare_tokenizer(bert, None)
    rows = [{"a": "w1 " * n, "b": "w2", "label": "xy"[n % 2]} for n in range(1, 8)]
    config = ClassificationTask(text=text, max_length=7)
    longer = prepare_task(config.model_copy(update={"max_length": 60}), splits(rows))
    whole = longer.tokenize(Dataset.from_list(rows), tokenizer)["length"][:]
    found = prepare_task(config, splits(rows)).tokenize(Dataset.from_list(rows), tokenizer)
    assert found["cut"][:] == [int(n > 7) for n in whole]
