"""The clients of one process, around one resident model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from datasets import Dataset
from torch import Tensor, float64
from torch.nn import Module

from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import RecipeError
from fedexlora.exchange.layout import adapter_tensors, dense_tensors
from fedexlora.exchange.records import HolderRecord
from fedexlora.exchange.scores import ScoreReport
from fedexlora.exchange.seeds import derive_seed
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate
from fedexlora.local.job import LocalJob
from fedexlora.local.memory import ClientMemory, Remembered
from fedexlora.local.scoring import HeldOut
from fedexlora.local.slots import after_each, putting_back
from fedexlora.methods.rule import ClientRound, Rule, Trainables
from fedexlora.peft_bridge.model import AdaptedModel

Found = TypeVar("Found")
Measure = Callable[[AdaptedModel, GlobalState, Dataset], HolderRecord]
"""A model as a client's, at a version, and rows of that client: its half of the certificate."""


class LocalClients:
    """One resident model that trains any of the clients that are given to it.

    ``num_examples`` has the rows by client, in the order of the partition; ``rule`` is that of the
    method.

    Args:
        model: the model; it is left as some client's.
        rows: the tokenised rows of all clients.
        shares: by client, which of them it has.
        job: trains one of them.
        seed: the federation's.
        specs: the adapters of the clients that have another one than the model, by client.
        rule: what clients do by the method.
        held_out: rows that are scored and not trained on, where clients score.
        measure: what the holder of a model says of it, where the server has none.
        probe: trains the one epoch by which clients of some methods choose what they train.
    """

    def __init__(
        self,
        model: AdaptedModel,
        rows: Dataset,
        shares: Mapping[str, Sequence[int]],
        job: LocalJob,
        seed: int,
        specs: Mapping[str, AdapterSpec],
        rule: Rule,
        held_out: HeldOut | None = None,
        measure: Measure | None = None,
        probe: LocalJob | None = None,
    ) -> None:
        self.model = model
        self._rows = rows
        self._shares = shares
        self.num_examples = {client: len(share) for client, share in shares.items()}
        self._job, self._probe = job, probe
        self._seed = seed
        self._specs = specs
        self.rule = rule
        self._held_out = held_out
        self._measure = measure
        self._applied: Mapping[str, LowRank] | None = None

    def rehearse(self) -> None:
        """Take one step and undo it.

        Raises:
            RecipeError: naming the clients that would drop all of their rows; or if it fails.
        """
        least = self._job.least_rows
        if short := [name for name, rows in self.num_examples.items() if rows < least]:
            raise RecipeError(
                f"training.dataloader_drop_last leaves these clients nothing to train on, as they "
                f"have fewer rows than training.per_device_train_batch_size = {least}",
                [f"{name}: {self.num_examples[name]} row(s)" for name in short],
            )
        self._job.rehearse(self.model.peft_model, self._rows)

    def rows_of(self, client: str) -> Dataset:
        """The tokenised rows of one client, selected anew: of many clients, few are at work."""
        return self._rows.select(self._shares[client])

    def update(
        self,
        client: str,
        held: GlobalState,
        round_: int,
        progress: Callable[[str, int, int], None],
        memory: ClientMemory | None = None,
    ) -> bytes:
        """Train one client from the version that it holds, and encode what it learned.

        Where clients score, it scores that version first.

        Args:
            client: the client.
            held: the version, with the client's own adapter if it has one.
            round_: the round, from 1.
            progress: told of the client, steps done and steps in all.
            memory: what clients remember of the method; None where it remembers nothing.

        Raises:
            OSError: if what the client remembers cannot be written.
        """
        at, since = self._client_round(client, held, round_, memory)
        entered = self._enter(held, at)
        rows, live, holder, scores = self.rows_of(client), self.model.peft_model, None, None
        if self._measure is not None:
            holder = self._measure(self.model, entered, rows)
        if self._held_out is not None and held.version % self._held_out.every == 0:
            scores = self._held_out.scores(client, live)
        with self.model.training_only(self.rule.trains(round_)):
            put_back = self._choose(held, at, rows)
            done = self._job.train(
                live,
                rows,
                seed=derive_seed(self._seed, round_, client),
                round_=round_,
                on_step=after_each(put_back, partial(progress, client)),
            )
        return ClientUpdate(
            client=client,
            round=round_,
            version=held.id,
            num_examples=len(rows),
            loss=done.loss,
            base=self.model.base_fingerprint,
            tensors=self._leave(at, memory),
            memory=since,
            scores=scores,
            holder=holder,
        ).encode()

    def _choose(self, held: GlobalState, at: ClientRound, rows: Dataset) -> Callable[[], None]:
        """What puts back, after every step, what the method has the client not train."""
        choose = self.rule.client.slots if self.rule.client is not None else None
        if choose is None:
            return lambda: None
        if self._probe is None:
            raise AssertionError("a method whose clients choose what they train needs a probe")
        seed = derive_seed(self._seed, at.round, f"{at.client}\0probe")
        self._probe.train(
            self.model.peft_model, rows, seed=seed, round_=at.round, on_step=lambda *_: None
        )
        slots = choose(at, Trainables(self.model.factors(), self.model.dense()))
        self._enter(held, at)
        return putting_back(self.model, slots)

    def as_client(
        self,
        client: str,
        held: GlobalState,
        work: Callable[[Module], Found],
        memory: ClientMemory | None = None,
    ) -> Found:
        """What comes of work on the model that a client would train from a version.

        Args:
            client: the client.
            held: the version that it holds, with its own adapter if it has one.
            work: given the live model; it trains nothing.
            memory: what clients remember of the method; None where it remembers nothing.
        """
        self._enter(held, self._client_round(client, held, held.version + 1, memory)[0])
        return work(self.model.peft_model)

    def trainables(
        self, client: str, held: GlobalState, memory: ClientMemory | None = None
    ) -> Trainables:
        """What a client would train from a version: of a method without a global model, its own."""
        at, _ = self._client_round(client, held, held.version + 1, memory)
        return at.received if self.rule.client is None else self.rule.client.enter(at)

    def report(self, client: str, held: GlobalState, memory: ClientMemory | None = None) -> bytes:
        """Score the version that a client holds on its own rows, and encode what it found.

        Raises:
            RecipeError: if clients do not score.
        """
        if self._held_out is None:
            raise RecipeError("evaluation.where: clients do not score in this run")
        scores = self.as_client(client, held, partial(self._held_out.scores, client), memory)
        return ScoreReport(client, held.id, self.model.base_fingerprint, scores).encode()

    def _client_round(
        self, client: str, held: GlobalState, round_: int, memory: ClientMemory | None
    ) -> tuple[ClientRound, int | None]:
        """What the method sees of a client on entering a round, and the round of its memory."""
        remembered, since = Remembered(), None
        if memory is not None and self.rule.remembers_at_clients:
            remembered = memory.read(client, round_)
            since = remembered.round
        received = Trainables(held.adapter_of(client), held.dense)
        spec = self._specs.get(client, self.model.spec)
        seed = derive_seed(self._seed, round_, f"{client}\0fresh")
        fresh = partial(self.model.fresh, spec, seed)
        return ClientRound(client, round_, received, remembered.tensors, fresh), since

    def _enter(self, held: GlobalState, at: ClientRound) -> GlobalState:
        """Have the model be what the client starts from; that, as the client's own version."""
        if self._applied is not held.total:
            self.model.apply(held)
            self._applied = held.total
        rule, client = self.rule.client, at.client
        if rule is not None:
            start = rule.enter(at)
            factors, own = start.factors, held.own
            if client in own:
                held = replace(held, own={client: factors}, dense=start.heads)
            else:
                held = replace(held, adapter=factors, dense=start.heads)
        makes_up = self.rule.makes_up
        self.model.enter(held, client, self._specs.get(client), makes_up=makes_up)
        return held if makes_up or client not in held.own else self._alone(client, held)

    def _alone(self, client: str, held: GlobalState) -> GlobalState:
        """A version in which a client's own adapter is the common one, in the common scaling."""
        own, common = self._specs[client].modules, self.model.spec.modules
        adapter = {
            name: pair.to(float64).scaled(own[name].scaling / common[name].scaling)
            for name, pair in held.own[client].items()
        }
        return replace(held, adapter=adapter)

    def _leave(self, at: ClientRound, memory: ClientMemory | None) -> dict[str, Tensor]:
        """What the client sends, by the names of ``AdapterSpec.tensors``; it remembers the rest."""
        trained = Trainables(self.model.factors(), self.model.dense())
        if self.rule.client is not None:
            trained, remembered = self.rule.client.leave(at, trained)
            if memory is not None and remembered:
                memory.write(at.client, at.round, remembered)
        found = adapter_tensors(trained.factors) | dense_tensors(trained.heads)
        wanted = self.rule.upload_spec(self.model.spec, at.round)
        return {name: found[name] for name in wanted.tensors()}
