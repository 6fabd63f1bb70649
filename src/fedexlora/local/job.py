"""One client's work in one round, whatever library does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from datasets import Dataset

OnStep = Callable[[int, int], None]
"""Told of every step before the next one begins: steps done, and steps in all. It may put back what
a step should not have changed."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """What is known of a client's training beside the parameters that it trained."""

    loss: float
    """The mean training loss; NaN if any step's was."""
    steps: int
    """Of the optimizer."""
    rows: int
    """Rows that were read, each as often as it was."""


class LocalJob(Protocol):
    """Trains a client: a job is a file of its own, and ``local_job`` chooses one.

    A job leaves no trace on the model but the values that it trained, and keeps nothing of a client
    for the next one or for the next round: what it draws is a function of the seed.
    """

    @property
    def least_rows(self) -> int:
        """The rows that a client must have to be trained at all."""
        ...

    def rehearse(self, model: torch.nn.Module, rows: Dataset) -> None:
        """Take one step and undo it: what fails at once fails before the run.

        Args:
            model: the model; it is left as it was.
            rows: tokenised rows with their ``length``, at least one.

        Raises:
            RecipeError: if the step fails, or its loss is not finite.
        """
        ...

    def train(
        self,
        model: torch.nn.Module,
        rows: Dataset,
        *,
        seed: int,
        round_: int,
        on_step: OnStep,
    ) -> JobResult:
        """Train a model's trainable parameters, in place, on one client's rows.

        Nothing else of the model is changed, also if training fails.

        Args:
            model: the model; it starts from the global version of the round.
            rows: tokenised rows with their ``length``.
            seed: of dropout and of the order of rows.
            round_: the round, from 1.
            on_step: told of every step.

        Raises:
            BridgeError: if training changed what is frozen.
        """
        ...
