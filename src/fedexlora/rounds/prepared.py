"""What the server's side of a recipe names, loaded and checked; the model may be elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fedexlora.errors import RecipeError, RunError
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.peft_bridge.adapter_layout import AdapterLayout
from fedexlora.peft_bridge.arithmetic import Arithmetic
from fedexlora.peft_bridge.device import find_device
from fedexlora.peft_bridge.origin import Origin
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.recipe import Recipe

if TYPE_CHECKING:  # they need transformers and PEFT, which a server without a model has not
    from fedexlora.data.task import Task
    from fedexlora.peft_bridge.model import AdaptedModel
    from fedexlora.rounds.rows import RowSummary
    from fedexlora.rounds.scoring import Scoring

_ROWS_READ = 8
"""Validation rows over which is measured what comes out of the layers."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The server's side of a run; nothing is written yet."""

    recipe: Recipe
    specs: Mapping[str, AdapterSpec] = field(default_factory=dict)
    """The adapters of the clients that have another one than the model, by client."""
    task: Task | None = None
    """With what it learned from the rows and the model; None where the server has neither."""
    scoring: Scoring | None = None
    """None where the server does not score."""
    model: AdaptedModel | None = None
    """The server's own; None where it does not score."""
    origin: Origin | None = None
    """Version 0, where the server has no model."""
    first: GlobalState | None = None
    """Version 0 with adapters of clients of their own, where the server has no model."""
    data_fingerprint: str | None = None
    """None where the server reads no rows."""
    summary: RowSummary | None = None
    arithmetic: Mapping[str, str] | None = None
    """In which the model is trained and scored, as far as this process knows."""

    @property
    def spec(self) -> AdapterSpec:
        """What clients train that have no adapter of their own."""
        return self._origin.spec if self.model is None else self.model.spec

    @property
    def base(self) -> str:
        """Fingerprint of the base model."""
        return self._origin.base if self.model is None else self.model.base_fingerprint

    @property
    def precision(self) -> str:
        """How the adapted frozen weights are stored."""
        return self._origin.precision if self.model is None else self.model.precision()

    @property
    def layout(self) -> AdapterLayout:
        """How PEFT stores what is trained."""
        if self.model is None:
            return self._origin.layout
        from fedexlora.peft_bridge.export import layout_of

        return layout_of(self.model)

    @property
    def trained_parameters(self) -> int:
        """How many numbers a client trains."""
        if self.model is not None:
            return sum(p.numel() for p in self.model.peft_model.parameters() if p.requires_grad)
        return sum(spec.numel for spec in self.spec.tensors().values())

    @property
    def device(self) -> str:
        """Where the model is trained and scored; empty where that is on other machines."""
        return "" if self.task is None else str(find_device(self.recipe.device))

    @property
    def validation_rows(self) -> int:
        """How many the server scores on."""
        return 0 if self.scoring is None else len(self.scoring.validation)

    @property
    def _origin(self) -> Origin:
        if self.origin is None:
            raise RunError("the server has neither a model nor its origin")
        return self.origin

    def initial(self) -> GlobalState:
        """Version 0."""
        if self.model is not None:
            seed, truncated = self.recipe.federation.seed, self.recipe.rule.truncates
            return self.model.initial_state(self.specs, seed, truncated=truncated)
        return self._origin.state() if self.first is None else self.first

    def evaluate(self, observer: Observer) -> dict[str, float]:
        """Scores of the server's model as it is now; none where the server does not score."""
        if self.scoring is None or self.model is None:
            return {}
        return self.scoring.scores(self.model.peft_model, observer)

    @property
    def forwards(self) -> dict[Arithmetic, Callable[[], None]]:
        """By arithmetic in which the server's model is used: it reads some validation rows."""
        if self.scoring is None or self.model is None:
            return {}
        read, model = self.scoring.read_rows, self.model.peft_model
        return {how: partial(read, model, how, _ROWS_READ) for how in self.model.arithmetics}

    def scorers(self) -> dict[str, dict[str, str]]:
        """By metric of generated texts: what computes it; see ``rounds.scoring``."""
        if self.scoring is None:
            return {}
        from fedexlora.rounds.scoring import all_scorers

        return all_scorers(self.recipe)

    def stated(self) -> dict[str, str]:
        """What nodes have stated of version 0, where the server has no model: digests by part."""
        if self.model is not None or self.first is not None:
            return {}
        said = self._origin.encode()[0]
        return {"spec": said.spec, "heads": said.heads}

    def summed_up(self) -> dict[str, Any]:
        """What is known of the rows, for ``run.json``."""
        return {} if self.summary is None else self.summary.record()


def check_reduction_device(recipe: Recipe) -> None:
    """Refuse a device that this machine has not.

    Raises:
        RecipeError: if it has not.
    """
    found, wanted = torch.cuda.device_count(), torch.device(recipe.federation.reduce_on)
    if wanted.type == "cuda" and (wanted.index or 0) >= found:
        raise RecipeError(
            "this machine cannot reduce updates there",
            [f"federation.reduce_on: {wanted} is asked for, there are {found} CUDA device(s)"],
        )


def refuse_one_place(recipe: Recipe) -> None:
    """Refuse a method that trains on all rows in one place, where clients keep theirs.

    Raises:
        RecipeError: if it is one.
    """
    if recipe.rule.pooled:
        raise RecipeError(
            f"method.name: {recipe.method.name} trains on the rows of all clients in one place",
            ["nodes keep theirs: run it with fedexlora run, where the data are"],
        )


def check_clients(recipe: Recipe, clients: Sequence[str]) -> None:
    """Refuse a recipe that says something of a client that there is not.

    Raises:
        RecipeError: naming every such client.
    """
    if unknown := [client for client in recipe.clients if client not in clients]:
        raise RecipeError(
            "the recipe names clients that there are not",
            [f'clients."{client}": expected one of {", ".join(clients)}' for client in unknown],
        )
