"""Chat: the tokens of the assistant's turns in a conversation, up to and with their end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import datasets
from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedexlora.data.batches import tokenized
from fedexlora.data.chat_prompts import answer_frame, chat_prompts
from fedexlora.data.chat_template import ChatTemplateError, Span, WrittenChat, chat_template
from fedexlora.data.checks import missing_columns, named_splits
from fedexlora.data.config import ChatTask
from fedexlora.data.conversation import Message, read_conversation
from fedexlora.data.cuts import Cut
from fedexlora.data.language_task import LanguageTask
from fedexlora.data.load import Splits
from fedexlora.data.prompts import Prompts
from fedexlora.data.token_loss import IGNORED, check_targets
from fedexlora.errors import DataError
from fedexlora.exchange.untrusted import short

_SHOWN = 10
Row = TypeVar("Row")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Chat(LanguageTask):
    """A chat task; see ``fedexlora.data.task.Task`` for what its members do."""

    config: ChatTask

    def tokenize(self, rows: Dataset, tokenizer: Tokenizer) -> Dataset:
        """Conversations as tokens; ``labels`` are ``IGNORED`` but in the assistant's turns.

        Raises:
            DataError: if there is no template, or it does not write some row as its model would
                read it, or its own marks of what is generated are not the assistant's turns, or
                some row has no target.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "the tokenizer: chat needs one that says where in a text its tokens are (a "
                f"tokenizer.json), found {type(tokenizer).__name__}"
            )
        template = chat_template(tokenizer, self.config.chat_template)
        chats = _by_row(template.write, self._conversations(rows))
        faults: list[str] = []

        def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            written = [chats[row] for row in batch["row"]]
            # verbose: it would warn of texts longer than the model reads, which are cut afterwards
            tokens = tokenizer(
                [x.text for x in written],
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            labels = []
            for row, ids, spans in zip(
                batch["row"], tokens["input_ids"], tokens["offset_mapping"], strict=True
            ):
                targets, fault = _targets(chats[row], spans)
                labels.append([x if y else IGNORED for x, y in zip(ids, targets, strict=True)])
                if fault is not None:
                    faults.append(f"row {row + 1}: {fault}")
            return _cut(tokens["input_ids"], labels, self.config.max_length)

        numbers = Dataset.from_dict({"row": range(len(chats))})
        result = tokenized(numbers, encode, datasets.Sequence(Value("int32")))
        if faults:
            raise DataError(
                "what the chat template marks with {% generation %} is not what it prompts for; "
                "correct its marks, or leave them out (task.chat_template)",
                _shown(faults),
            )
        check_targets(result)
        return result

    def prompts(self, rows: Dataset, tokenizer: Tokenizer) -> Prompts:
        """The conversations up to their last answer, as the template prompts for that.

        Raises:
            DataError: if some row does not end with an answer.
        """
        conversations = self._conversations(rows)
        faults = [
            f"row {number}: expected the assistant's turn at the end, found the {x[-1]['role']}'s"
            for number, x in enumerate(conversations, 1)
            if x[-1]["role"] != "assistant"
        ]
        if faults:
            said = "task.generation has the model write the last turn of every validation row"
            raise DataError(said, _shown(faults))
        template = chat_template(tokenizer, self.config.chat_template)
        chats = _by_row(template.write, conversations)
        asked = zip(conversations, (chat.prompt for chat in chats), strict=True)
        around = _by_row(lambda row: template.around(*row), asked)
        frame = answer_frame(tokenizer, around)
        answers = [x[-1]["content"] for x in conversations]
        return chat_prompts(chats, answers, frame, tokenizer, self.config.max_length)

    def _conversations(self, rows: Dataset) -> list[list[Message]]:
        return [read_conversation(value)[0] for value in rows[self.config.messages][:]]


def prepare_chat(config: ChatTask, splits: Splits) -> Chat:
    """Check the conversations of both splits.

    Raises:
        DataError: with the faults, by row and message.
    """
    faults = missing_columns(splits, [config.messages])
    if faults and all("conversations" in rows.column_names for _, rows in named_splits(splits)):
        faults = [f'{x}; for ShareGPT\'s, set task.messages = "conversations"' for x in faults]
    for split, rows in named_splits(splits):
        if config.messages in rows.column_names:
            faults += _shown(f"{split}, {x}" for x in _row_faults(rows[config.messages]))
    if faults:
        raise DataError("the data set does not fit the chat task", faults)
    return Chat(config)


def _by_row(make: Callable[[Row], Made], rows: Iterable[Row]) -> list[Made]:
    """What a template makes of every row.

    Raises:
        DataError: naming the rows of which it does not make what its model would read.
    """
    made, faults = [], []
    for number, row in enumerate(rows, 1):
        try:
            made.append(make(row))
        except ChatTemplateError as fault:
            faults.append(f"row {number}: {fault}")
    if faults:
        raise DataError("the conversations do not fit the chat template", _shown(faults))
    return made


def _row_faults(values: Iterable[object]) -> list[str]:
    return [
        f"row {number}, {fault}"
        for number, value in enumerate(values, 1)
        for fault in read_conversation(value)[1]
    ]


def _shown(faults: Iterable[str]) -> list[str]:
    """The first of many faults, and how many more there are."""
    every = list(faults)
    more = len(every) - _SHOWN
    return [*every[:_SHOWN], f"... and {more} more"] if more > 0 else every


def _targets(chat: WrittenChat, tokens: Sequence[Span]) -> tuple[list[bool], str | None]:
    """Whether each token is a target, and what is wrong with the template's own marks.

    These may only differ from the answers in the white space around them, and then count.
    """
    answers = _covered(tokens, chat.answers)
    if chat.marks is None:
        return answers, None
    marked = _covered(tokens, chat.marks)
    runs = groupby(zip(tokens, answers, marked, strict=True), key=lambda x: x[1:])
    for (answer, mark), run in runs:
        places = [place for place, _, _ in run]
        text = chat.text[places[0][0] : places[-1][1]]
        if answer != mark and text.strip():
            what = "a part of an answer, but not marked" if answer else "marked, but of no answer"
            return marked, f"{short(text)} is {what}"
    return marked, None


def _covered(tokens: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Of every token, whether some of its characters lie in a span; both are in order."""
    covered, place = [], 0
    for start, end in tokens:
        while place < len(spans) and spans[place][1] <= start:
            place += 1
        inside = place < len(spans) and spans[place][0] < end
        covered.append(inside)
    return covered


def _cut(
    ids: Sequence[list[int]], labels: Sequence[list[int]], max_length: int
) -> dict[str, list[Any]]:
    """The columns of rows that lose their end, where they are too long."""
    cuts = []
    for row in labels:
        lost = row[max_length:]
        cut = Cut.TEXT if lost else Cut.NOTHING
        cuts.append(int(Cut.ANSWER_END if set(lost) - {IGNORED} else cut))
    kept = [x[:max_length] for x in ids]
    return {
        "input_ids": kept,
        "attention_mask": [[1] * len(x) for x in kept],
        "labels": [x[:max_length] for x in labels],
        "cut": cuts,
    }
