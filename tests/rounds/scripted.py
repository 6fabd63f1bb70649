"""A transport whose clients say what a test tells them to."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fedexlora.errors import RunError
from fedexlora.exchange.delivery import Delivery, receive
from fedexlora.exchange.history import History, Holdings
from fedexlora.exchange.records import RoundRecord
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate
from fedexlora.methods import METHODS, Rule
from fedexlora.peft_bridge.model import AdaptedModel
from fedexlora.rounds.observer import Observer
from fedexlora.rounds.participation import Participation
from fedexlora.rounds.round import Federation
from fedexlora.rounds.round import run_round as play_round
from fedexlora.rounds.transport import ClientProgress, Reply

WEIGHTS = {"site-a": 1, "site-b": 2, "site-c": 5}

IDS: dict[int, str] = {}
"""The ids of the versions that clients came to last, for updates that a test makes of nothing."""

OTHER = "0" * 64
"""The id of no version."""

Script = Callable[[int, str, GlobalState], Sequence[Reply]]


class Scripted:
    """Every client holds a copy of its own; replies come from ``script(round, client, held)``."""

    stateless = ()

    def __init__(self, script: Script, clients: Sequence[str] = tuple(WEIGHTS)) -> None:
        self._script = script
        self.clients = clients
        self.held: dict[str, GlobalState] = {}
        self.waiting: dict[str, int] = {}
        self.asked: deque[tuple[str, str]] = deque()
        """Client, and why it missed the version; empty if it did not."""
        self.delivered: list[tuple[str, int]] = []
        """Client and bytes of every message."""
        self.holdings: Holdings | None = None
        """What the server knows; kept here from one round to the next."""

    def ask(self, round_: int, client: str, delivery: Delivery) -> None:
        self.delivered.append((client, delivery.size))
        held, message = self.held.pop(client, None), delivery.message
        try:
            state = receive(held, delivery.announced, message, delivery.own, client)
        except RunError as error:
            self.asked.append((client, str(error)))
        else:
            IDS[state.version] = state.id
            self.held[client] = state
            self.asked.append((client, ""))

    def restore(self, client: str, state: GlobalState) -> None:
        self.held[client] = state

    def replies(
        self, round_: int, deadline: float | None, progress: ClientProgress
    ) -> Iterator[Reply]:
        while self.asked:
            client, missed = self.asked.popleft()
            if missed:
                yield Reply(client, round_, missed=missed)
                if self.asked and self.asked[-1][0] == client:
                    self.asked.rotate(1)
            else:
                yield from self._script(round_, client, self.held[client])


def run_round(parts: Federation, before: GlobalState) -> tuple[GlobalState, RoundRecord]:
    """One round; what clients hold is kept in the transport."""
    held = parts.transport.holdings or Holdings({}, History(4))
    state, parts.transport.holdings, record = play_round(parts, before, held)
    return state, record


def random_update(model: AdaptedModel, round_: int, client: str, **changes: object) -> ClientUpdate:
    """An update of random factors: nothing like the version that the client held."""
    generator = torch.Generator().manual_seed(1000 * round_ + sum(client.encode()))
    tensors = {
        name: 0.3 * torch.randn(spec.shape, generator=generator).to(spec.dtype)
        for name, spec in model.spec.tensors().items()
    }
    fields = {
        "client": client,
        "round": round_,
        "version": IDS.get(round_ - 1, OTHER),
        "num_examples": WEIGHTS.get(client, 1),
        "loss": 1.0,
        "base": model.base_fingerprint,
        "tensors": tensors,
    }
    return ClientUpdate(**(fields | changes))


def replies(*updates: ClientUpdate) -> list[Reply]:
    return [Reply(update.client, update.round, update.encode()) for update in updates]


def federation(
    model: AdaptedModel, method: str | Rule, script: Script | None = None, **changes: object
) -> tuple[Federation, GlobalState]:
    """A federation of three clients with weights 1 : 2 : 5, at version 0."""

    def random_script(round_: int, client: str, held: GlobalState) -> list[Reply]:
        return replies(random_update(model, round_, client))

    transport = Scripted(script or random_script)
    state = model.initial_state(changes.get("specs", {}))
    model.apply(state)
    parts = {
        "method": method if isinstance(method, str) else "fedex",
        "rule": METHODS[method].default if isinstance(method, str) else method,
        "model": model,
        "specs": {},
        "seed": 0,
        "transport": transport,
        "participation": Participation(),
        "evaluate": lambda state: {"loss": 0.0},
        "spool": Path(tempfile.mkdtemp()) / "spool",
        "keep": lambda updates: None,
        "observer": Observer(),
    }
    return Federation(**(parts | changes)), state
