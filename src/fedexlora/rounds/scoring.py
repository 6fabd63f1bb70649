"""The validation rows of a recipe, and the scores of a model on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

import torch
from datasets import Dataset
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from fedexlora.data.capacity import check_capacity
from fedexlora.data.choices import Choices, prepare_choices
from fedexlora.data.generation import Generation, check_metrics, prepare_generation, scorers
from fedexlora.data.load import Splits, load_validation
from fedexlora.data.task import Task, prepare_task
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.device import find_device
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.recipe import Recipe
from fedexlora.rounds.set_mean import MEAN, mean_score


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a model is scored on."""

    recipe: Recipe
    task: Task
    tokenizer: PreTrainedTokenizerBase
    validation: Dataset
    """Tokenised."""
    generation: Generation | None
    """The prompts after which the model writes, if the task says so."""
    choices: Choices | None
    """The answers of which one is the likeliest, if the task has any."""
    sets: Mapping[str, Scoring] = field(default_factory=dict)
    """By name, other rows that it is scored on."""

    @property
    def notes(self) -> list[str]:
        """What is odd about prompts, and yet no fault."""
        own = [] if self.generation is None else list(self.generation.notes)
        return own + [f"{name}: {note}" for name, x in self.sets.items() for note in x.notes]

    def scores(self, model: Module, observer: Observer) -> dict[str, float]:
        """Every metric, in the recipe's arithmetic; the model is left as it was.

        Those of a set have its name and a dot before theirs; ``mean`` is that of those that
        ``evaluation.mean`` names.
        """
        with scoring_arithmetic(self.recipe).active(next(model.parameters()).device):
            found = self.task.evaluate(
                model,
                self.validation,
                self.tokenizer,
                self.recipe.evaluation.batch_size,
                observer.evaluating,
            )
            # A model that has diverged has no likeliest token; its run is about to stop.
            if self.generation is not None and isfinite(found["loss"]):
                found |= self.generation.evaluate(model, self.tokenizer, observer.evaluating)
            if self.choices is not None:
                found |= self.choices.evaluate(
                    model,
                    self.tokenizer,
                    self.recipe.evaluation.batch_size,
                    observer.evaluating,
                )
        for name, scoring in self.sets.items():
            scores = scoring.scores(model, observer)
            found |= {f"{name}.{metric}": value for metric, value in scores.items()}
        if self.recipe.evaluation.mean is not None:
            found |= mean_score(self.recipe.evaluation.mean, found)
        return found

    def read_rows(self, model: Module, arithmetic: Arithmetic, count: int) -> None:
        """Have the model read the first rows, and write nothing."""
        rows = self.validation.select(range(min(len(self.validation), count)))
        with arithmetic.active(next(model.parameters()).device):
            self.task.evaluate(model, rows, self.tokenizer, self.recipe.evaluation.batch_size)


@dataclass(frozen=True, slots=True)
class SetRows:
    """The rows of one of ``[evaluation.sets]``."""

    recipe: Recipe
    rows: Dataset


def load_sets(recipe: Recipe) -> dict[str, SetRows]:
    """Read the rows of all sets, and check that every metric can be computed on this machine.

    Raises:
        DataError: if a metric's package is missing, or the rows of a set.
    """
    check_metrics(recipe.task)
    recipes = {name: recipe.of_set(name) for name in recipe.evaluation.sets}
    for own in recipes.values():
        check_metrics(own.task)
    seed = recipe.federation.seed
    return {name: SetRows(own, load_validation(own.data, seed)) for name, own in recipes.items()}


def prepare_scoring(
    recipe: Recipe,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    model: Module,
    rows: Dataset,
    sets: Mapping[str, SetRows],
) -> Scoring:
    """Tokenise validation rows and those of all sets, and their prompts if a task generates.

    Raises:
        DataError: if rows do not fit the task or the model.
    """
    generation = prepare_generation(task, rows, tokenizer, model)
    return Scoring(
        recipe,
        task,
        tokenizer,
        task.tokenize(rows, tokenizer),
        generation,
        prepare_choices(task, rows, tokenizer),
        {name: _of_set(name, own, task, tokenizer, model) for name, own in sets.items()},
    )


def _of_set(
    name: str, own: SetRows, task: Task, tokenizer: PreTrainedTokenizerBase, model: Module
) -> Scoring:
    config = own.recipe.task
    if config.kind == "classification":  # the outputs are those of the labels that are trained
        config = config.model_copy(update={"labels": task.config.labels})
    told = prepare_task(config, Splits.one(name, own.rows))
    scoring = prepare_scoring(own.recipe, told, tokenizer, model, own.rows, {})
    half = own.recipe.model.dtype == "float16"
    check_capacity(config, model, tokenizer, {name: scoring.validation}, half=half)
    return scoring


def all_scorers(recipe: Recipe) -> dict[str, dict[str, str]]:
    """By metric of generated texts, of sets too, and the mean: what computes it, with versions."""
    found = scorers(recipe.task)
    for name in recipe.evaluation.sets:
        own = scorers(recipe.of_set(name).task)
        found |= {f"{name}.{metric}": scorer for metric, scorer in own.items()}
    if recipe.evaluation.mean is not None:
        said = f"the mean of {', '.join(recipe.evaluation.mean)}"
        found[MEAN] = {"implementation": said, "version": ""}
    return found


def scoring_device(recipe: Recipe) -> torch.device:
    """Where the model is when it is scored: where it is trained."""
    return find_device(recipe.device)


def scoring_arithmetic(recipe: Recipe) -> Arithmetic:
    """How the model multiplies when it is scored."""
    return Arithmetic.of_scoring(recipe.scoring_dtype, recipe.model.dtype)
