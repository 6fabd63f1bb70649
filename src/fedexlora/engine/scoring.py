"""The validation rows of a recipe, and the scores of a model on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from datasets import Dataset
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from fedexlora.data.generation import Generation, prepare_generation
from fedexlora.data.task import Task
from fedexlora.engine.observer import Observer
from fedexlora.engine.recipe import Recipe
from fedexlora.peft_bridge.arithmetic import Arithmetic


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

    def scores(self, model: Module, observer: Observer) -> dict[str, float]:
        """Every metric, in the recipe's arithmetic; the model is left as it was."""
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
        return found

    def read_rows(self, model: Module, arithmetic: Arithmetic, count: int) -> None:
        """Have the model read the first rows, and write nothing."""
        rows = self.validation.select(range(min(len(self.validation), count)))
        with arithmetic.active(next(model.parameters()).device):
            self.task.evaluate(model, rows, self.tokenizer, self.recipe.evaluation.batch_size)


def prepare_scoring(
    recipe: Recipe,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    model: Module,
    rows: Dataset,
) -> tuple[Scoring, Sequence[str]]:
    """Tokenise validation rows, and their prompts if the task generates.

    Returns:
        What a model is scored on, and notes on the prompts.

    Raises:
        DataError: if rows do not fit the task, or the model has too few positions for a prompt.
    """
    generation = prepare_generation(task, rows, tokenizer, model)
    scoring = Scoring(recipe, task, tokenizer, task.tokenize(rows, tokenizer), generation)
    return scoring, () if generation is None else generation.notes


def scoring_arithmetic(recipe: Recipe) -> Arithmetic:
    """How the model multiplies when it is scored."""
    return Arithmetic.of_scoring(recipe.scoring_dtype, recipe.model.dtype)
