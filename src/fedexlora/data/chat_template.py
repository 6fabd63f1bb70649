"""A chat template, and where the assistant's turns are in what it writes.

The template alone knows what it writes for an answer, so it is asked: what it writes up to the
prompt for the answer, and up to the end of the answer. Between the two lies what a model has to
generate, the end-of-turn token included. That holds only if both are the beginning of what it
writes for the whole conversation; where they are not, the conversation is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fedexlora.data.conversation import Message
from fedexlora.errors import DataError
from fedexlora.exchange.untrusted import short

Span: TypeAlias = tuple[int, int]
"""The first character, and the one after the last."""

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Llama 3's templates write this day where none is given and there is no clock.
_DATE = "26 Jul 2024"
_SHOWN = 60
_ANSWER = "Answer7Text"


class ChatTemplateError(ValueError):
    """A conversation that a template does not write as its model would read it."""


@dataclass(frozen=True, slots=True)
class WrittenChat:
    """A conversation as text."""

    text: str
    answers: tuple[Span, ...]
    """What a model has to generate, one span for each of the assistant's turns."""
    marks: tuple[Span, ...] | None
    """What the template itself marks as generated; None if it marks nothing."""

    @property
    def prompt(self) -> str:
        """What is read before the last answer."""
        return self.text[: self.answers[-1][0]]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja template, rendered in transformers' sandbox."""

    source: str
    special_tokens: dict[str, str]

    @property
    def marked(self) -> bool:
        """Whether it marks what is generated, with ``{% generation %}``."""
        return _MARK.search(self.source) is not None

    def write(self, messages: Sequence[Message]) -> WrittenChat:
        """Write a conversation, and find the assistant's turns in it.

        Args:
            messages: a conversation without faults; see `fedexlora.data.conversation`.

        Raises:
            ChatTemplateError: if the template raises, leaves a text out, ends no answer, or writes
                a turn otherwise when more follow.
        """
        text, marks = self._render(messages)
        written = "".join(text.split())
        for number, message in enumerate(messages, 1):
            if message["role"] != "assistant" and not _holds(written, message["content"]):
                raise ChatTemplateError(
                    f"message {number}: the template does not write the text of the "
                    f"{message['role']}'s turn, or not all of it"
                )
        answers = tuple(
            self._answer(messages, number, text)
            for number, message in enumerate(messages, 1)
            if message["role"] == "assistant"
        )
        return WrittenChat(text, answers, marks if self.marked else None)

    def around(self, messages: Sequence[Message], prompt: str) -> tuple[str, str]:
        """What it writes before the last answer and none of its prompt, and what after it.

        Another text is written in the answer's place: the answer's own may stand around it too.

        Args:
            messages: a conversation that ends with an answer.
            prompt: what is read before that.

        Raises:
            ChatTemplateError: if the template does not write a word as it is.
        """
        text, _ = self._render([*messages[:-1], {**messages[-1], "content": _ANSWER}])
        before, found, after = text.removeprefix(prompt).partition(_ANSWER)
        if not text.startswith(prompt) or not found:
            raise ChatTemplateError(
                f"message {len(messages)}: where an answer begins and ends cannot be told, as the "
                f"template does not write {short(_ANSWER)} as it is"
            )
        return before, after

    def _answer(self, messages: Sequence[Message], number: int, text: str) -> Span:
        """Where the answer with a number, from 1, is in the text of the whole conversation."""
        place = f"message {number}"
        prompt, _ = self._render(messages[: number - 1], prompt=True)
        through = text
        if number < len(messages):
            through = self._within(text, self._render(messages[:number])[0])
        if not text.startswith(through):
            raise ChatTemplateError(
                f"{place}: the template writes the conversation up to here otherwise when more "
                "messages follow, as one does that strips earlier reasoning; use rows that end "
                "with this answer, or another template (task.chat_template)"
            )
        if not through.startswith(prompt):
            raise ChatTemplateError(
                f"{place}: what the template prompts for this answer with is not what it writes "
                f"before it: {short(prompt[-_SHOWN:])}; use another template (task.chat_template)"
            )
        self._check_answer(messages, number, prompt, through)
        return len(prompt), len(through)

    def _check_answer(
        self, messages: Sequence[Message], number: int, prompt: str, through: str
    ) -> None:
        answer = "".join(messages[number - 1]["content"].split())
        written = "".join(through[len(prompt) :].split())
        before, found, after = written.partition(answer)
        if not found:
            raise ChatTemplateError(f"message {number}: the template cuts the answer off")
        if not after:
            raise ChatTemplateError(
                f"message {number}: the template writes nothing that ends the answer, so that the "
                "model would never learn to end one; use another template (task.chat_template)"
            )
        if before and prompt == self._render(messages[: number - 1])[0]:
            raise ChatTemplateError(
                f"message {number}: the template writes {short(before)} before the answer, but not "
                "when asked for it (add_generation_prompt); use another one (task.chat_template)"
            )

    def _within(self, text: str, beginning: str) -> str:
        """A beginning without the end token, where only the end of the conversation has that."""
        end = self.special_tokens.get("eos_token", "")
        if end and not text.startswith(beginning):
            return beginning.removesuffix(end)
        return beginning

    def _render(
        self, messages: Sequence[Message], *, prompt: bool = False
    ) -> tuple[str, tuple[Span, ...]]:
        """The text, and the spans that the template marks as generated.

        Raises:
            ChatTemplateError: with the template's own message.
        """
        try:
            texts, marks = render_jinja_template(
                [list(messages)],
                chat_template=self.source,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=prompt,
                **{**self.special_tokens, "date_string": _DATE},
            )
        except Exception as error:  # whatever an expression in a template can raise
            raise ChatTemplateError(
                f"the template raises {type(error).__name__}: {short(str(error))}"
            ) from error
        spans = tuple((start, end) for start, end in marks[0] if start < end) if marks else ()
        return texts[0], spans


def chat_template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> ChatTemplate:
    """The template of a task.

    Args:
        tokenizer: the model's.
        given: a Jinja template; the tokenizer's own if None.

    Raises:
        DataError: if there is none, or it writes the day on which it is used.
    """
    hint = 'give one with task.chat_template = "FILE.jinja"'
    if given is None and not tokenizer.chat_template:
        raise DataError(f"the tokenizer: expected a chat template, found none; {hint}")
    try:
        source: str = given if given is not None else tokenizer.get_chat_template()
    except ValueError as error:  # several, and none of them the default
        raise DataError(f"the tokenizer's chat template: {error}; {hint}") from error
    if "strftime_now" in source and "date_string" not in source:
        raise DataError(
            "the chat template writes the day on which it is used (strftime_now), so that a run "
            f"could not be repeated; {hint}"
        )
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return ChatTemplate(source, special)


def _holds(written: str, content: str) -> bool:
    """Whether text without white space has a content, as it is or as JSON."""
    plain = "".join(content.split())
    return plain in written or "".join(json.dumps(content, ensure_ascii=False).split()) in written
