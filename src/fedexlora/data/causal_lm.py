"""Language modelling: the tokens of a text, or of a completion after a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Sequence, Value
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedexlora.data.batches import tokenized
from fedexlora.data.checks import missing_columns, named_splits, shown_columns, text_faults
from fedexlora.data.config import CausalLMTask
from fedexlora.data.cuts import Cut
from fedexlora.data.language_task import LanguageTask
from fedexlora.data.load import Splits
from fedexlora.data.prompts import Prompts, cut_beginnings, distinct
from fedexlora.data.template import fill
from fedexlora.data.token_loss import IGNORED, check_targets
from fedexlora.data.tokenizer import token_ids
from fedexlora.errors import DataError


@dataclass(frozen=True, slots=True)
class CausalLM(LanguageTask):
    """A language modelling task; see ``fedexlora.data.task.Task`` for what its members do."""

    config: CausalLMTask

    def tokenize(self, rows: Dataset, tokenizer: Tokenizer) -> Dataset:
        """Rows as tokens that end with the end token; ``labels`` are ``IGNORED`` in the prompt.

        Raises:
            DataError: if the tokenizer has no end token, or some rows have no target.
        """
        end = tokenizer.eos_token_id
        if end is None:
            raise DataError("the tokenizer: expected an end token for causal-lm, found none")
        begin = _begin(tokenizer)

        def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            prompts, targets = self.texts(batch)
            rows = [
                _join(begin, prompt, [*target, end], self.config.max_length)
                for prompt, target in zip(
                    token_ids(tokenizer, prompts), token_ids(tokenizer, targets), strict=True
                )
            ]
            if self.config.text is not None:
                rows = [(ids, ids, cut) for ids, _, cut in rows]
            ids, labels, cuts = (list(x) for x in zip(*rows, strict=True))
            return {
                "input_ids": ids,
                "attention_mask": [[1] * len(x) for x in ids],
                "labels": labels,
                "cut": cuts,
            }

        result = tokenized(rows, encode, Sequence(Value("int32")))
        check_targets(result)
        return result

    def prompts(self, rows: Dataset, tokenizer: Tokenizer) -> Prompts:
        """What is read before each completion, as in training, and no target after it."""
        columns = rows.select_columns(list(self.config.columns))[:]
        texts, targets = self.texts(columns)
        different, of_row = distinct(texts)
        tokens, notes = cut_beginnings(
            token_ids(tokenizer, different), _begin(tokenizer), self.config.max_length
        )
        completion = self.config.completion
        answers = [x.strip() for x in targets] if completion is None else columns[completion]
        return Prompts(tokens, of_row, answers, notes=notes)

    def texts(self, batch: Mapping[str, list[Any]]) -> tuple[list[str], list[str]]:
        """Prompts and targets of a batch; a prompt is empty where all of a text is the target."""
        config = self.config
        if config.text is not None:
            texts = batch[config.text]
            return [""] * len(texts), texts
        columns = {x: [text or "" for text in batch[x]] for x in config.columns}
        for part, column in (("prompt", config.prompt), ("completion", config.completion)):
            if column is not None:
                columns[part] = batch[column]
        count = len(columns[config.columns[0]])
        templates = (config.prompt_template, config.completion_template)
        prompts, targets = (fill(template, columns, count) for template in templates)
        return prompts, targets


def prepare_causal_lm(config: CausalLMTask, splits: Splits) -> CausalLM:
    """Check the columns of both splits.

    Raises:
        DataError: with all faults.
    """
    faults = missing_columns(splits, config.main_columns)
    faults += [
        f"{split}: task.prompt_template and task.completion_template: {{{name}}} is no column; "
        f"there are {shown_columns(rows)}"
        for split, rows in named_splits(splits)
        for name in config.template_columns
        if name not in rows.column_names
    ]
    faults += text_faults(splits, config.main_columns)
    faults += text_faults(splits, config.template_columns, in_every_row=False)
    if faults:
        raise DataError("the data set does not fit the causal-lm task", faults)
    return CausalLM(config)


def _begin(tokenizer: Tokenizer) -> list[int]:
    """The token that this tokenizer begins every text with, if it has one."""
    begin: list[int] = tokenizer("")["input_ids"][:1]
    return begin if begin == [tokenizer.bos_token_id] else []


def _join(
    begin: list[int], prompt: list[int], target: list[int], max_length: int
) -> tuple[list[int], list[int], int]:
    """Token ids, labels, and what was cut: a prompt's beginning first, then a target's end."""
    kept = target[: max_length - len(begin)]
    room = max_length - len(begin) - len(kept)
    context = begin + prompt[max(0, len(prompt) - room) :]
    lost = Cut.PROMPT if len(prompt) > room else Cut.NOTHING
    if len(kept) < len(target):
        lost = Cut.ANSWER_END
    return context + kept, [IGNORED] * len(context) + kept, int(lost)
