"""Local training of one client in one round, by transformers' ``Trainer``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
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
from fedexlora.local.arguments import arguments
from fedexlora.peft_bridge.arithmetic import float32_products
from fedexlora.peft_bridge.isolation import isolation

_NO_TARGET = -100
"""The label of a token that is not predicted."""
Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""


def train_locally(
    model: torch.nn.Module,
    rows: Dataset,
    collator: Collator,
    options: Mapping[str, Any],
    *,
    seed: int,
    progress: Progress,
) -> float:
    """Train a model's trainable parameters, in place, on one client's rows.

    Nothing else of the model is changed, also if training fails.

    Args:
        model: the model; it starts from the global version of the round.
        rows: tokenised rows with their ``length``.
        collator: rows to a padded batch.
        options: fields of ``TrainingArguments``.
        seed: of dropout and of the order of rows.
        progress: told of every step.

    Returns:
        The mean training loss; NaN if any step's loss was.

    Raises:
        BridgeError: if training changed what is frozen.
    """
    products = float32_products(tf32=options.get("tf32") is True)
    folder = tempfile.TemporaryDirectory(prefix="fedexlora-")
    with folder as path, isolation(model), products:
        trainer = _Trainer(
            model=model,
            args=arguments(options, seed=seed, folder=path),
            train_dataset=rows,
            data_collator=collator,
            callbacks=[_Report(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        return float(trainer.train().training_loss)


def rehearse(
    model: torch.nn.Module, rows: Dataset, collator: Collator, options: Mapping[str, Any]
) -> None:
    """Take one step on the longest rows, and undo it: what fails at once fails before the run.

    Args:
        model: the model; it is left as it was.
        rows: tokenised rows with their ``length``, at least one.
        collator: rows to a padded batch.
        options: fields of ``TrainingArguments``.

    Raises:
        RecipeError: if the step fails, or its loss is not finite.
    """
    trained = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    size = arguments(options, seed=0, folder=tempfile.gettempdir()).train_batch_size
    longest = np.argsort(-np.asarray(rows["length"][:]), kind="stable")[:size]
    # No report: it would begin a run of its own wherever reports go.
    once = {"max_steps": 1, "gradient_accumulation_steps": 1, "report_to": "none"}
    try:
        loss = train_locally(
            model, rows.select(longest), collator, {**options, **once}, seed=0, progress=_ignore
        )
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


def _ignore(step: int, steps: int) -> None:
    """Of a step that is undone, nobody is told."""


class _Trainer(Trainer):  # type: ignore[misc] # transformers is untyped here
    """``Trainer`` with the mean over all targets of a step, however it is cut into batches.

    Models disagree about what they make of gradient accumulation: some average over all of its
    targets, some add up the means of its batches. Here each gives the mean of one batch, which
    counts by the targets in it. The lengths of all rows are read at once, as sorted one by one
    each is read from the table.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - Trainer's own
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
        return batches, torch.stack([_targets(batch["labels"]) for batch in batches]).sum()

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

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,  # noqa: ANN401 - the signature is Trainer's
    ) -> None:
        del args, control
        self._progress(state.global_step, state.max_steps)
