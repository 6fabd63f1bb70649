"""The mask is the one that TRL's `SFTTrainer` makes for `assistant_only_loss`; skipped without TRL.

TRL is no part of the development environment. With a source of it on the path (version 1.16.0 was
used), `pytest tests/data/test_chat_trl.py` compares every label.
"""

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from fedexlora.data.config import ChatTask
from fedexlora.data.load import Splits
from fedexlora.data.task import prepare_task
from tests.data.chats import CHATS, FAMILIES, chat, chat_tokenizer, template

trl = pytest.importorskip("trl")


def labels_of_trl(chats, tokenizer, folder):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(folder), assistant_only_loss=True, max_length=None, use_cpu=True, report_to=[]
        ),
        train_dataset=Dataset.from_list([{"messages": x} for x in chats]),
        processing_class=tokenizer,
    )
    rows = trainer.train_dataset
    return rows["input_ids"][:], rows["labels"][:]


def labels_of_ours(chats, tokenizer, **options):
    rows = Dataset.from_list([{"messages": x} for x in chats])
    found = prepare_task(ChatTask(**options), Splits(rows, rows, "")).tokenize(rows, tokenizer)
    return found["input_ids"][:], found["labels"][:]


@pytest.mark.parametrize("family", FAMILIES)
def test_marked_and_unmarked_templates_give_the_labels_of_trl(family, tmp_path):
    marked = chat_tokenizer(family, template(family, marked=True))
    expected = labels_of_trl(CHATS, marked, tmp_path)
    assert labels_of_ours(CHATS, marked) == expected
    assert labels_of_ours(CHATS, marked, chat_template=template(family)) == expected


@pytest.mark.parametrize("published", ["llama3", "qwen3_instruct_2507", "gemma"])
def test_published_templates_give_the_labels_that_trl_makes_with_its_marked_copies(
    published, tmp_path
):
    """TRL puts a copy with marks in the place of a template that it knows."""
    source = getattr(trl.chat_template_utils, f"{published}_chat_template")
    tokenizer = chat_tokenizer("llama3", source)
    chats = [chat("u: one", "a: first", "u: two", "a: second"), CHATS[0], CHATS[4]]
    ours = labels_of_ours(chats, tokenizer)
    assert ours == labels_of_trl(chats, tokenizer, tmp_path)
    assert any(x != -100 for x in ours[1][0])
