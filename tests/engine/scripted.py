"""A transport whose clients say what a test tells them to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fedexlora.engine.observer import Observer
from fedexlora.engine.round import Federation
from fedexlora.engine.transport import ClientProgress, Reply
from fedexlora.exchange.shipment import encode_own, encode_total, receive
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate
from fedexlora.methods import METHODS, Method
from fedexlora.peft_bridge.model import AdaptedModel

WEIGHTS = {"site-a": 1, "site-b": 2, "site-c": 5}

Script = Callable[[int, str, GlobalState], Sequence[Reply]]


class Scripted:
    """Ships as the real transport does; replies come from ``script(round, client, held)``."""

    def __init__(self, model: AdaptedModel, script: Script) -> None:
        self._model = model
        self._script = script
        self.held: GlobalState | None = None

    @property
    def clients(self) -> Sequence[str]:
        return tuple(WEIGHTS)

    def restore(self, state: GlobalState) -> None:
        self._model.apply(state)
        self.held = state

    def ship(self, message: bytes, own: Mapping[str, bytes]) -> Mapping[str, int]:
        self.restore(receive(self.held, message, own))
        return {client: len(message) + len(own.get(client, b"")) for client in self.clients}

    def train(self, round_: int, progress: ClientProgress) -> Iterator[Reply]:
        for client in self.clients:
            yield from self._script(round_, client, self.held)


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
        "version": round_ - 1,
        "num_examples": WEIGHTS[client],
        "loss": 1.0,
        "base": model.base_fingerprint,
        "tensors": tensors,
    }
    return ClientUpdate(**(fields | changes))


def replies(*updates: ClientUpdate) -> list[Reply]:
    return [Reply(update.client, update.encode(), "", 0.0) for update in updates]


def federation(
    model: AdaptedModel, method: str | Method, script: Script | None = None, **changes: object
) -> tuple[Federation, GlobalState]:
    """A federation of three clients with weights 1 : 2 : 5, at version 0."""

    def random_script(round_: int, client: str, held: GlobalState) -> list[Reply]:
        return replies(random_update(model, round_, client))

    transport = Scripted(model, script or random_script)
    state = model.initial_state(changes.get("specs", {}))
    transport.ship(encode_total(state), encode_own(state))
    parts = {
        "method": METHODS[method] if isinstance(method, str) else method,
        "model": model,
        "specs": {},
        "seed": 0,
        "transport": transport,
        "evaluate": lambda: {"loss": 0.0},
        "keep": lambda update, held: None,
        "observer": Observer(),
    }
    return Federation(**(parts | changes)), state
