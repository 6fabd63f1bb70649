"""The prompts of conversations whose last answer a model is to write, and how it ends one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer

from fedexlora.data.chat_template import WrittenChat
from fedexlora.data.decoding import decoded
from fedexlora.data.prompts import AnswerFrame, Prompts, cut_beginnings, distinct
from fedexlora.data.tokenizer import token_ids
from fedexlora.exchange.untrusted import short


def chat_prompts(
    chats: Sequence[WrittenChat],
    answers: Sequence[str],
    frame: AnswerFrame,
    tokenizer: Tokenizer,
    max_length: int,
) -> Prompts:
    """The prompts of conversations that end with an answer.

    Args:
        chats: what the template wrote of each conversation, at least one.
        answers: the last answer of each.
        frame: what the template writes around these.
        tokenizer: the model's.
        max_length: most tokens of a prompt.
    """
    texts, of_row = distinct([chat.prompt for chat in chats])
    tokens = token_ids(tokenizer, texts)
    begin = [tokenizer.bos_token_id]
    begin = begin if all(x[:1] == begin for x in tokens) else []
    kept, cut = cut_beginnings([x[len(begin) :] for x in tokens], begin, max_length)
    notes = [f"{note}, with it the system's text and the first turns" for note in cut]
    trained = token_ids(tokenizer, [chat.text for chat in chats])
    prompts = [tokens[i] for i in of_row]
    odd = sum(x[: len(y)] != y for x, y in zip(trained, prompts, strict=True))
    if odd:
        notes.append(
            f"in {odd} of {len(chats)} rows the end of the prompt and the beginning of the answer "
            "are one token in training, which no model can write after the prompt"
        )
    notes += [
        f"the template writes {short(x)} before an answer: the model learns to write it too, and "
        "it is no part of a text that is scored"
        for x in frame.openings
    ]
    return Prompts(kept, of_row, answers, frame, notes)


def answer_frame(tokenizer: Tokenizer, around: Iterable[tuple[str, str]]) -> AnswerFrame:
    """What stands around answers, as a tokenizer has it.

    The token that a template writes right after an answer ends one, whether or not the model's own
    files name it. A template that writes only text there has that text for an end.

    Args:
        tokenizer: the model's.
        around: the texts before and after each answer.
    """
    openings, endings = (dict.fromkeys(x) for x in zip(*around, strict=True))
    before = [decoded(tokenizer, ids).strip() for ids in token_ids(tokenizer, list(openings))]
    own = frozenset((*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder))
    ends, stops = set(), []
    for ids in token_ids(tokenizer, list(endings)):
        place = next((i for i, x in enumerate(ids) if x in own), len(ids))
        text = tokenizer.decode(ids[:place], clean_up_tokenization_spaces=False).strip()
        if text:
            stops.append(text)
        else:
            ends.add(ids[place])
    return AnswerFrame(tuple(dict.fromkeys(x for x in before if x)), frozenset(ends), tuple(stops))
