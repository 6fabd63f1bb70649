"""Language modelling: the tokens of a text, or of a completion after a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, inf
from typing import Any

from datasets import Dataset, Sequence, Value
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedexlora.data.batches import Collator, Progress, map_batches, tokenized, without_length
from fedexlora.data.checks import missing_columns, text_faults
from fedexlora.data.config import CausalLMTask
from fedexlora.data.load import Splits
from fedexlora.errors import DataError

IGNORED = -100
"""The label of a token that is not a target, as torch and transformers have it."""

_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True, slots=True)
class CausalLM:
    """A language modelling task; see ``fedexlora.data.task.Task`` for what its members do."""

    config: CausalLMTask

    @property
    def peft_task_type(self) -> str:
        """What peft calls the task."""
        return "CAUSAL_LM"

    @property
    def partition_column(self) -> None:
        """Texts are no classes: there is no column to divide by."""
        return

    @property
    def model_config(self) -> dict[str, Any]:
        """Nothing: the model is used as it is."""
        return {}

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
            prompts, targets = self._texts(batch)
            pairs = [
                _join(begin, prompt, [*target, end], self.config.max_length)
                for prompt, target in zip(
                    _tokens(tokenizer, prompts), _tokens(tokenizer, targets), strict=True
                )
            ]
            if self.config.text is not None:
                pairs = [(ids, ids) for ids, _ in pairs]
            ids, labels = (list(x) for x in zip(*pairs, strict=True))
            return {
                "input_ids": ids,
                "attention_mask": [[1] * len(x) for x in ids],
                "labels": labels,
            }

        result = tokenized(rows, encode, Sequence(Value("int32")))
        _check_targets(result)
        return result

    def collator(self, tokenizer: Tokenizer) -> Collator:
        """Makes a padded batch; ``labels`` are ``(n, tokens)`` int64, ``IGNORED`` in padding."""
        return without_length(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED))

    def evaluate(
        self,
        model: nn.Module,
        tokenized: Dataset,
        tokenizer: Tokenizer,
        batch_size: int,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """``"loss"``, the mean over all target tokens, and ``"perplexity"``, if asked for.

        Every token counts the same, whichever row or batch it is in; summed in float64.
        """
        collate = self.collator(tokenizer)
        scores = map_batches(
            model, tokenized, collate, batch_size, _token_loss, progress, use_cache=False
        )
        loss = sum(total for total, _ in scores) / sum(count for _, count in scores)
        measured = {"loss": loss}
        if "perplexity" in self.config.metrics:
            measured["perplexity"] = exp(loss) if loss <= _LARGEST_EXPONENT else inf
        return measured

    def _texts(self, batch: Mapping[str, list[Any]]) -> tuple[list[str], list[str]]:
        if self.config.text is not None:
            texts = batch[self.config.text]
            return [""] * len(texts), texts
        template = self.config.prompt_template
        prompts = [template.replace("{prompt}", x) for x in batch[str(self.config.prompt)]]
        return prompts, batch[str(self.config.completion)]


def prepare_causal_lm(config: CausalLMTask, splits: Splits) -> CausalLM:
    """Check the columns of both splits.

    Raises:
        DataError: with all faults.
    """
    columns = [x for x in (config.text, config.prompt, config.completion) if x is not None]
    faults = missing_columns(splits, columns) + text_faults(splits, columns)
    if faults:
        raise DataError("the data set does not fit the causal-lm task", faults)
    return CausalLM(config)


def _begin(tokenizer: Tokenizer) -> list[int]:
    """The token that this tokenizer begins every text with, if it has one."""
    begin: list[int] = tokenizer("")["input_ids"][:1]
    return begin if begin == [tokenizer.bos_token_id] else []


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    # verbose: it would warn of texts longer than the model reads, which are cut afterwards
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _join(
    begin: list[int], prompt: list[int], target: list[int], max_length: int
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row: the prompt loses its beginning, then the target its end."""
    target = target[: max_length - len(begin)]
    room = max_length - len(begin) - len(target)
    context = begin + prompt[max(0, len(prompt) - room) :]
    return context + target, [IGNORED] * len(context) + target


def _check_targets(rows: Dataset) -> None:
    # The first token is never predicted, so its label is no target.
    bare = [i for i, labels in enumerate(rows["labels"][:], 1) if set(labels[1:]) <= {IGNORED}]
    if bare:
        raise DataError(
            f"expected a token to predict in every row, found none in {len(bare)} of {len(rows)}, "
            f"the first is row {bare[0]}; remove empty rows or raise task.max_length"
        )


def _token_loss(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    # Only targets are widened to float32: all logits of a batch may not fit twice.
    losses = cross_entropy(logits[:, :-1][chosen].float(), targets[chosen], reduction="none")
    return float(losses.double().sum()), int(chosen.sum())
