"""The default job: local training by transformers' ``Trainer``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from fedexlora.errors import RecipeError
from fedexlora.local.arguments import arguments, full_batches_only
from fedexlora.local.job import JobResult, OnStep
from fedexlora.local.schedule import Position
from fedexlora.peft_bridge.arithmetic import float32_products
from fedexlora.peft_bridge.isolation import isolation

_NO_TARGET = -100
"""The label of a token that is not predicted."""
Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class TrainerJob:
    """A client's epochs by transformers' ``Trainer``: a new one, with a new optimizer, each round.

    Its methods are those of :class:`~fedexlora.local.job.LocalJob`.
    """

    options: Mapping[str, Any]
    """The ``[training]`` table."""
    collator: Collator
    """Rows to a padded batch."""
    rounds: int = 1
    """Of the run."""

    @property
    def least_rows(self) -> int:
        """The rows that a client must have because smaller batches are dropped; else 0."""
        return full_batches_only(self.options)

    def train(
        self, model: torch.nn.Module, rows: Dataset, *, seed: int, round_: int, on_step: OnStep
    ) -> JobResult:
        """Train a model's trainable parameters, in place, on one client's rows."""
        products = float32_products(tf32=self.options.get("tf32") is True)
        folder = tempfile.TemporaryDirectory(prefix="fedexlora-")
        whole_run = self.options.get("schedule") == "run"
        with folder as path, isolation(model), products:
            trainer = _Trainer(
                Position(round_, self.rounds) if whole_run else None,
                model=model,
                args=arguments(self.options, seed=seed, folder=path),
                train_dataset=rows,
                data_collator=self.collator,
                callbacks=[_Report(on_step)],
            )
            trainer.remove_callback(PrinterCallback)
            done = trainer.train()
        return JobResult(float(done.training_loss), int(done.global_step), trainer.rows_read)

    def rehearse(self, model: torch.nn.Module, rows: Dataset) -> None:
        """Take one step on the longest rows, and undo it."""
        trained = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
        size = arguments(self.options, seed=0, folder=tempfile.gettempdir()).train_batch_size
        longest = np.argsort(-np.asarray(rows["length"][:]), kind="stable")[:size]
        # No report: it would begin a run of its own wherever reports go.
        once = {"max_steps": 1, "gradient_accumulation_steps": 1, "report_to": "none"}
        job = replace(self, options={**self.options, **once})
        try:
            loss = job.train(
                model, rows.select(longest), seed=0, round_=1, on_step=lambda *_: None
            ).loss
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise RecipeError("the model cannot be trained as [training] says", [said]) from error
        finally:
            with torch.no_grad():
                for parameter, value in trained:
                    parameter.copy_(value)
        if not isfinite(loss):
            raise RecipeError(
                "the model cannot be trained as [training] says",
                [
                    f"the loss of its first step is {loss}",
                    "try model.dtype = 'float32' without training.fp16, and check the labels",
                ],
            )


class _Trainer(Trainer):  # type: ignore[misc] # transformers is untyped here
    """``Trainer`` with the mean over all targets of a step, however it is cut into batches.

    Models disagree about what they make of gradient accumulation: some average over all of its
    targets, some add up the means of its batches. Here each gives the mean of one batch, which
    counts by the targets in it. The lengths of all rows are read at once, as sorted one by one
    each is read from the table.

    Args:
        position: the round, if its learning rates are a part of the run's; else they are its own.
        options: those of ``Trainer``.
    """

    def __init__(self, position: Position | None, **options: Any) -> None:  # noqa: ANN401 - its own
        self._position = position
        self.rows_read = 0
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """The batches of one step, and the targets in all of them."""
        batches: list[dict[str, Tensor]]
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self.rows_read += sum(len(batch["labels"]) for batch in batches)
        return batches, torch.stack([_targets(batch["labels"]) for batch in batches]).sum()

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """The round's learning rates: a schedule of its own, or its part of the run's."""
        if self._position is None:
            own: LRScheduler = super().create_scheduler(num_training_steps, optimizer)
            return own
        part = self._position.scheduler(self.args, optimizer or self.optimizer, num_training_steps)
        self.lr_scheduler: LRScheduler = part
        return part

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """What a batch adds to the mean over the targets of its step."""
        del return_outputs  # asked for in evaluation alone
        here = _targets(inputs["labels"])
        loss: Tensor = super().compute_loss(model, inputs)
        if num_items_in_batch is None:
            return loss
        return loss * (here.to(loss.device) / num_items_in_batch.to(loss.device))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.lengths = list(sampler.lengths)
        return sampler


def _targets(labels: Tensor) -> Tensor:
    """How many targets a batch has: its rows, or the tokens ``(n, length)`` that are predicted."""
    if labels.dim() == 1:
        return torch.tensor(len(labels))
    return (labels[:, 1:] != _NO_TARGET).sum()


class _Report(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Tells of every optimizer step."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,  # noqa: ANN401 - the signature is Trainer's
    ) -> None:
        del args, control
        self._on_step(state.global_step, state.max_steps)
