"""Evaluation by generation: the prompts of a task's rows, and scores of what is written after them.

Rows with equal prompts are one prompt with several references. A row of an answer rule is one
answer, whatever other rows have its prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedexlora.data.answers.table import ANSWER_RULES, AnswerRule, grade, rule_faults
from fedexlora.data.answers.verdict import Verdict
from fedexlora.data.batches import Progress
from fedexlora.data.capacity import positions
from fedexlora.data.checks import missing_columns, text_faults
from fedexlora.data.config import TaskConfig
from fedexlora.data.decoding import write_texts
from fedexlora.data.generation_config import GenerationConfig
from fedexlora.data.language_task import LanguageTask
from fedexlora.data.load import Splits
from fedexlora.data.prompts import NO_FRAME, AnswerFrame
from fedexlora.data.score import Score, versions
from fedexlora.data.task import Task
from fedexlora.data.text_metrics.table import TEXT_METRICS, TextMetric, metric_faults, text_scores
from fedexlora.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model has to write, and what its texts are held against."""

    config: GenerationConfig
    prompts: Sequence[Sequence[int]]
    """Token ids of each distinct prompt, in the order of their first rows."""
    prompt_of_row: Sequence[int]
    """By row, which prompt it has."""
    references: Sequence[str]
    """By row."""
    frame: AnswerFrame = NO_FRAME
    """What stands around an answer, and is none of it."""
    notes: Sequence[str] = ()
    """What is odd about the prompts, and yet no fault."""

    def evaluate(
        self, model: nn.Module, tokenizer: Tokenizer, progress: Progress | None = None
    ) -> dict[str, float]:
        """Every metric, and counts beside them under names with a slash.

        ``generation/unfinished`` counts prompts, ``NAME/unparsed`` and ``NAME/undecided`` rows (the
        latter only if there are any). A metric whose program fails has no value, and
        ``NAME/uncomputed`` is 1; the log says why.
        """
        written = write_texts(model, self.prompts, tokenizer, self.config, progress, self.frame)
        measured = self.scores([x.text for x in written])
        return measured | {"generation/unfinished": float(sum(not x.finished for x in written))}

    def scores(self, texts: Sequence[str]) -> dict[str, float]:
        """The metrics of one text for each prompt, and counts of answers that cannot be read."""
        measured: dict[str, float] = {}
        names = [name for name in self.config.metrics if name in TEXT_METRICS]
        for score in text_scores(names, texts, self.grouped) if names else ():
            measured |= _entry(score.name, score)
        for name in self.config.metrics:
            if name in ANSWER_RULES:
                measured |= self._graded(name, texts)
        return measured

    def _graded(self, name: str, texts: Sequence[str]) -> dict[str, float]:
        answers = [texts[prompt] for prompt in self.prompt_of_row]
        graded = grade(name, answers, self.references)
        counts = graded.counts
        measured = _entry(name, graded.score)
        measured[f"{name}/unparsed"] = float(counts[Verdict.UNPARSED])
        if counts[Verdict.UNDECIDED]:
            measured[f"{name}/undecided"] = float(counts[Verdict.UNDECIDED])
        return measured

    @property
    def grouped(self) -> list[list[str]]:
        """By prompt, the references of its rows."""
        grouped: list[list[str]] = [[] for _ in self.prompts]
        for prompt, reference in zip(self.prompt_of_row, self.references, strict=True):
            grouped[prompt].append(reference)
        return grouped


def prepare_generation(
    task: Task, rows: Dataset, tokenizer: Tokenizer, model: nn.Module
) -> Generation | None:
    """The prompts and references of rows, checked; None if the task generates nothing.

    Args:
        task: the task.
        rows: of the validation split.
        tokenizer: the model's.
        model: which has to have positions for the longest prompt and its text.

    Raises:
        DataError: with all faults: a column that is missing or has rows without a text, a reference
            that cannot be read, a prompt without a token, too few positions.
    """
    if not isinstance(task, LanguageTask) or task.config.generation is None:
        return None
    config: GenerationConfig = task.config.generation
    named = None if config.reference is None else _references(config.reference, rows)
    prompts = task.prompts(rows, tokenizer)
    faults = [] if all(prompts.tokens) else ["a prompt has no token to write after"]
    longest, limit = max(map(len, prompts.tokens)), positions(model)
    if limit is not None and longest + config.max_new_tokens > limit:
        faults.append(
            f"task.generation.max_new_tokens: expected at most {limit - longest}, as the longest "
            f"prompt has {longest} tokens and the model {limit} positions; "
            f"found {config.max_new_tokens}"
        )
    if faults:
        raise DataError("the validation rows cannot be prompts", faults)
    references = prompts.answers if named is None else named
    made = Generation(
        config, prompts.tokens, prompts.of_row, references, prompts.frame, prompts.notes
    )
    _check_references(made)
    return made


def check_metrics(task: TaskConfig) -> None:
    """Refuse a task whose metrics cannot be computed on this machine.

    Raises:
        DataError: naming what is missing for each metric, and how to get it.
    """
    config = getattr(task, "generation", None)
    if config is None:
        return
    names = config.metrics
    faults = metric_faults(name for name in names if name in TEXT_METRICS)
    faults += [fault for name in names if name in ANSWER_RULES for fault in rule_faults(name)]
    if faults:
        raise DataError("task.generation.metrics cannot be computed on this machine", faults)


def scorers(task: TaskConfig) -> dict[str, dict[str, str]]:
    """By metric of generated texts: what computes it, and the versions of its packages."""
    config: GenerationConfig | None = getattr(task, "generation", None)
    table: Mapping[str, TextMetric | AnswerRule] = {**TEXT_METRICS, **ANSWER_RULES}
    return {
        name: {
            "implementation": table[name].implementation,
            "version": versions(table[name].requirements),
        }
        for name in (config.metrics if config else ())
    }


def _references(column: str, rows: Dataset) -> list[str]:
    splits = Splits.one("validation", rows)
    faults = missing_columns(splits, [column]) or text_faults(splits, [column])
    if faults:
        raise DataError("the references of task.generation", faults)
    texts: list[str] = rows[column][:]
    return texts


def _check_references(generation: Generation) -> None:
    """Find now, and not after the first round, a reference that cannot be read."""
    if any(name in TEXT_METRICS for name in generation.config.metrics):
        empty = [i for i, text in enumerate(generation.references, 1) if not text.strip()]
        if empty:
            found = f"found an empty one in {len(empty)} row(s)"
            fault = f"expected a reference in every row, {found}, the first is row {empty[0]}"
            raise DataError("the references of task.generation", [fault])
    for name in generation.config.metrics:
        if name in ANSWER_RULES:
            grade(name, [""] * len(generation.references), generation.references)


def _entry(name: str, score: Score) -> dict[str, float]:
    if score.value is not None:
        return {name: score.value}
    _log.warning("%s is not computed: %s", name, score.reason)
    return {f"{name}/uncomputed": 1.0}
