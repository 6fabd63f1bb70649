"""One learning-rate schedule over all rounds of a run.

A round of S steps is a part of it: step k of round t has the learning rate of step (t - 1) S + k
of a schedule of T S steps, T being the run's rounds. What is counted are rounds, not those that a
client took part in: the rate is a function of (round, rounds) and needs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

_BY_SCORE = ("reduce_lr_on_plateau", "greedy")
_OWN_RATE = ("layerwise", "schedule_free")
"""In names of optimizers whose learning rate is not that of one scheduler."""


@dataclass(frozen=True, slots=True)
class Position:
    """Which of a run's rounds one is."""

    round: int
    """From 1."""
    rounds: int
    """Of the run."""

    def scheduler(self, arguments: TrainingArguments, optimizer: Optimizer, steps: int) -> LambdaLR:
        """The part of the run's schedule that is this round's.

        Args:
            arguments: name the schedule, its warm-up and its options.
            optimizer: whose learning rates are set.
            steps: of this round, and of every other one.
        """
        rate, before = rate_of_step(arguments, steps * self.rounds), steps * (self.round - 1)
        return LambdaLR(optimizer, lambda step: rate(before + step))


def rate_of_step(arguments: TrainingArguments, steps: int) -> Callable[[int], float]:
    """By step, from 0: what the learning rate is multiplied by, in a schedule of so many steps.

    Raises:
        ValueError: if the schedule is no function of the step.
    """
    # The schedule of an optimizer that trains nothing: what is wanted of it is its function.
    idle = SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    found = get_scheduler(
        arguments.lr_scheduler_type,
        idle,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    if not isinstance(found, LambdaLR):
        raise ValueError(f"lr_scheduler_type: {type(found).__name__} is no function of the step")
    (rate,) = found.lr_lambdas
    return rate


def schedule_faults(training: Mapping[str, Any]) -> Iterator[str]:
    """What of a ``[training]`` table cannot be scheduled, by key."""
    kind, optimizer = str(training.get("lr_scheduler_type")), str(training.get("optim"))
    if kind in _BY_SCORE:
        yield f"lr_scheduler_type: {kind!r} follows scores, and a client has none while it trains"
    if training.get("schedule") == "run" and any(part in optimizer for part in _OWN_RATE):
        yield (
            f"schedule: 'run' sets the learning rate of every step, and {optimizer!r} keeps its "
            f"own, which begins anew each round; choose another optim, or schedule = 'round'"
        )
