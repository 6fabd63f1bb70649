"""The clients of one process, around one resident model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from datasets import Dataset
from torch.nn import Module

from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import RecipeError
from fedexlora.exchange.records import HolderRecord
from fedexlora.exchange.scores import ScoreReport
from fedexlora.exchange.seeds import derive_seed
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate
from fedexlora.local.arguments import full_batches_only
from fedexlora.local.scoring import HeldOut
from fedexlora.local.trainer import Collator, rehearse, train_locally
from fedexlora.peft_bridge.model import AdaptedModel

Found = TypeVar("Found")
Measure = Callable[[AdaptedModel, GlobalState, Dataset], HolderRecord]
"""A model as a client's, at a version, and rows of that client: its half of the certificate."""


class LocalClients:
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
        held_out: rows that are scored and not trained on, where clients score.
        measure: what the holder of a model says of it, where the server has none.
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
        held_out: HeldOut | None = None,
        measure: Measure | None = None,
    ) -> None:
        self.model = model
        self._rows = rows
        self._shares = shares
        self.num_examples = {client: len(share) for client, share in shares.items()}
        self._collator = collator
        self._options = options
        self._seed = seed
        self._specs = specs
        self._held_out = held_out
        self._measure = measure
        self._applied: Mapping[str, LowRank] | None = None

    def rehearse(self) -> None:
        """Take one step and undo it.

        Raises:
            RecipeError: naming the clients that would drop all of their rows; or if it fails.
        """
        least = full_batches_only(self._options)
        if short := [name for name, rows in self.num_examples.items() if rows < least]:
            raise RecipeError(
                f"training.dataloader_drop_last leaves these clients nothing to train on, as they "
                f"have fewer rows than training.per_device_train_batch_size = {least}",
                [f"{name}: {self.num_examples[name]} row(s)" for name in short],
            )
        model = self.model.peft_model
        rehearse(model, self._rows, self._collator, self._options)

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

        Where clients score, it scores that version first.

        Args:
            client: the client.
            held: the version, with the client's own adapter if it has one.
            round_: the round, from 1.
            progress: told of the client, steps done and steps in all.
        """
        scores, held_out = None, self._held_out
        if held_out is not None and held.version % held_out.every == 0:
            scores = self.as_client(client, held, partial(held_out.scores, client))
        self._enter(client, held)
        rows = self.rows_of(client)
        holder = None
        if self._measure is not None:
            holder = self._measure(self.model, held, rows)
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
            version=held.id,
            num_examples=len(rows),
            loss=loss,
            base=self.model.base_fingerprint,
            tensors=self.model.update_tensors(),
            scores=scores,
            holder=holder,
        ).encode()

    def as_client(self, client: str, held: GlobalState, work: Callable[[Module], Found]) -> Found:
        """What comes of work on the model as a client has it; the model is left as the client's.

        Every score by a client, or of one, goes through here.

        Args:
            client: the client.
            held: the version that it holds, with its own adapter if it has one.
            work: given the live model; it trains nothing.
        """
        self._enter(client, held)
        return work(self.model.peft_model)

    def report(self, client: str, held: GlobalState) -> bytes:
        """Score the version that a client holds on its own rows, and encode what it found.

        Raises:
            RecipeError: if clients do not score.
        """
        if self._held_out is None:
            raise RecipeError("evaluation.where: clients do not score in this run")
        scores = self.as_client(client, held, partial(self._held_out.scores, client))
        return ScoreReport(client, held.id, self.model.base_fingerprint, scores).encode()

    def _enter(self, client: str, held: GlobalState) -> None:
        """Make the resident model the client's, at the version that it holds."""
        if self._applied is not held.total:
            self.model.apply(held)
            self._applied = held.total
        self.model.enter(held, client, self._specs.get(client))
