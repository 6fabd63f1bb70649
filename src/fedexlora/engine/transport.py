"""How the engine reaches clients, and the transport inside one process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from datasets import Dataset

from fedexlora.engine.local import Collator, train_locally
from fedexlora.engine.seeds import derive_seed
from fedexlora.exchange.shipment import receive
from fedexlora.exchange.spec import AdapterSpec
from fedexlora.exchange.state import GlobalState
from fedexlora.exchange.update import ClientUpdate
from fedexlora.peft_bridge.model import AdaptedModel

_log = logging.getLogger(__name__)

ClientProgress = Callable[[str, int, int], None]
"""Called with the client, steps done and steps in all."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back from one client in one round."""

    client: str
    message: bytes | None
    """An encoded update; None if the client failed."""
    failure: str
    """Why it failed; empty if it did not."""
    seconds: float


class Transport(Protocol):
    """What a round needs of the clients, wherever they are."""

    @property
    def clients(self) -> Sequence[str]:
        """The clients of the federation, in the order in which sums are taken."""

    def restore(self, state: GlobalState) -> None:
        """Bring every client to a version that it held before the run was interrupted."""

    def ship(self, message: bytes, own: Mapping[str, bytes]) -> Mapping[str, int]:
        """Send every client a message, and some one more of their own; the bytes, by client."""

    def train(self, round_: int, progress: ClientProgress) -> Iterator[Reply]:
        """Have every client train from the version it holds; replies in client order."""


class InProcessTransport:
    """All clients in this process, one after the other, around one resident model.

    Messages are encoded and decoded as over a network. The clients' copies of the global model are
    equal, so that one copy serves them all: what a client has of its own is its rows.

    Args:
        model: the resident model.
        clients: tokenised rows by client.
        collator: rows to a padded batch.
        options: fields of ``TrainingArguments``.
        seed: the federation's.
        specs: the adapters of the clients that have another one than the model, by client.
    """

    def __init__(
        self,
        model: AdaptedModel,
        clients: Mapping[str, Dataset],
        collator: Collator,
        options: Mapping[str, Any],
        seed: int,
        specs: Mapping[str, AdapterSpec],
    ) -> None:
        self._model = model
        self._rows = clients
        self._collator = collator
        self._options = options
        self._seed = seed
        self._specs = specs
        self._held: GlobalState | None = None

    @property
    def clients(self) -> Sequence[str]:
        """The clients in the order of the partition."""
        return tuple(self._rows)

    def restore(self, state: GlobalState) -> None:
        """Hold ``state``, as before the interruption."""
        self._hold(state)

    def ship(self, message: bytes, own: Mapping[str, bytes]) -> Mapping[str, int]:
        """Decode the message once, for the copy that all clients share."""
        self._hold(receive(self._held, message, own))
        return {client: len(message) + len(own.get(client, b"")) for client in self.clients}

    def train(self, round_: int, progress: ClientProgress) -> Iterator[Reply]:
        """Train one client after the other, each from its own adapter of the shared version."""
        for client in self.clients:
            started = time.perf_counter()
            message, failure = self._attempt(client, round_, progress)
            yield Reply(client, message, failure, time.perf_counter() - started)

    def _hold(self, state: GlobalState) -> None:
        self._model.apply(state)
        self._held = state

    def _attempt(
        self, client: str, round_: int, progress: ClientProgress
    ) -> tuple[bytes | None, str]:
        try:
            return self._train_one(client, round_, progress), ""
        except Exception as error:  # noqa: BLE001 - the boundary of a client: its faults are its own
            _log.debug("client %s failed in round %d", client, round_, exc_info=True)
            return None, f"{type(error).__name__}: {error}"

    def _train_one(self, client: str, round_: int, progress: ClientProgress) -> bytes:
        held = self._held
        if held is None:
            raise RuntimeError("train was called before a version was shipped")
        self._model.enter(held, client, self._specs.get(client))
        loss = train_locally(
            self._model.peft_model,
            self._rows[client],
            self._collator,
            self._options,
            seed=derive_seed(self._seed, round_, client),
            progress=lambda done, steps: progress(client, done, steps),
        )
        return ClientUpdate(
            client=client,
            round=round_,
            version=held.version,
            num_examples=len(self._rows[client]),
            loss=loss,
            base=self._model.base_fingerprint,
            tensors=self._model.update_tensors(),
        ).encode()
