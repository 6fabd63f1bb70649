"""Local training of one client in one round, by transformers' ``Trainer``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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

from fedexlora.algebra.lowrank import LowRank
from fedexlora.engine.seeds import derive_seed
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.peft_bridge.options import option_faults

Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""

_DEFAULTS: Mapping[str, Any] = {
    "num_train_epochs": 1,
    "train_sampling_strategy": "group_by_length",
    "report_to": "none",
    "logging_strategy": "no",
}
_FIXED: Mapping[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    # With the filter on, a step whose loss is NaN would count as 0 and go unnoticed.
    "logging_nan_inf_filter": False,
}
_RESERVED: Mapping[str, str] = {
    "output_dir": "it is --out",
    "seed": "it is federation.seed",
    "data_seed": "it follows from federation.seed",
    "do_train": "every client trains",
    "do_eval": "the global model is scored every round",
    "do_predict": "the global model is scored every round",
    "resume_from_checkpoint": "it is --resume",
    "load_best_model_at_end": "clients send what they have at the end of a round",
    "push_to_hub": "nothing is pushed from local training",
    "save_steps": "runs are checkpointed every round",
    "eval_steps": "the global model is scored every round",
} | dict.fromkeys(_FIXED, "it is fixed")


def training_faults(options: Mapping[str, Any]) -> list[str]:
    """Every fault of a recipe's ``[training]`` table; none means that training can start."""
    return option_faults(
        "training",
        options,
        TrainingArguments,
        _RESERVED,
        lambda: _arguments(options, seed=0, folder=tempfile.gettempdir()),
    )


def training_device(options: Mapping[str, Any]) -> torch.device:
    """Where ``Trainer`` will put the model."""
    device: torch.device = _arguments(options, seed=0, folder=tempfile.gettempdir()).device
    return device


def training_arithmetic(options: Mapping[str, Any]) -> Arithmetic:
    """How ``Trainer`` will multiply."""
    return Arithmetic.of_training(_arguments(options, seed=0, folder=tempfile.gettempdir()))


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

    Args:
        model: the model; it starts from the global version of the round.
        rows: tokenised rows with their ``length``.
        collator: rows to a padded batch.
        options: fields of ``TrainingArguments``.
        seed: of dropout and of the order of rows.
        progress: told of every step.

    Returns:
        The mean training loss; NaN if any step's loss was.
    """
    with tempfile.TemporaryDirectory(prefix="fedexlora-") as folder:
        trainer = _Trainer(
            model=model,
            args=_arguments(options, seed=seed, folder=folder),
            train_dataset=rows,
            data_collator=collator,
            callbacks=[_Report(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        return float(trainer.train().training_loss)


def _arguments(options: Mapping[str, Any], *, seed: int, folder: str) -> TrainingArguments:
    merged = {**_DEFAULTS, **options, **_FIXED}
    return TrainingArguments(output_dir=folder, seed=seed, data_seed=seed, **merged)


class _Trainer(Trainer):  # type: ignore[misc] # transformers is untyped here
    """Reads the lengths of all rows at once; sorted one by one, each is read from the table."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.lengths = list(sampler.lengths)
        return sampler


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


class LocalTrainer:
    """One resident model that trains any of the clients that are given to it.

    ``num_examples`` has the rows by client, in the order of the partition.

    Args:
        model: the model; it is left as some client's.
        rows: the tokenised rows of all clients.
        shares: by client, which of them it has.
        collator: rows to a padded batch.
        options: fields of ``TrainingArguments``.
        seed: the federation's.
        specs: the adapters of the clients that have another one than the model, by client.
    """

    def __init__(
        self,
        model: AdaptedModel,
        rows: Dataset,
        shares: Mapping[str, Sequence[int]],
        collator: Collator,
        options: Mapping[str, Any],
        seed: int,
        specs: Mapping[str, AdapterSpec],
    ) -> None:
        self.model = model
        self._rows = rows
        self._shares = shares
        self.num_examples = {client: len(share) for client, share in shares.items()}
        self._collator = collator
        self._options = options
        self._seed = seed
        self._specs = specs
        self._applied: Mapping[str, LowRank] | None = None

    def rows_of(self, client: str) -> Dataset:
        """The tokenised rows of one client, selected anew: of many clients, few are at work."""
        return self._rows.select(self._shares[client])

    def update(
        self,
        client: str,
        held: GlobalState,
        round_: int,
        progress: Callable[[str, int, int], None],
    ) -> bytes:
        """Train one client from the version that it holds, and encode what it learned.

        Args:
            client: the client.
            held: the version, with the client's own adapter if it has one.
            round_: the round, from 1.
            progress: told of the client, steps done and steps in all.
        """
        if self._applied is not held.total:
            self.model.apply(held)
            self._applied = held.total
        self.model.enter(held, client, self._specs.get(client))
        rows = self.rows_of(client)
        loss = train_locally(
            self.model.peft_model,
            rows,
            self._collator,
            self._options,
            seed=derive_seed(self._seed, round_, client),
            progress=lambda done, steps: progress(client, done, steps),
        )
        return ClientUpdate(
            client=client,
            round=round_,
            version=held.version,
            num_examples=len(rows),
            loss=loss,
            base=self.model.base_fingerprint,
            tensors=self.model.update_tensors(),
        ).encode()
