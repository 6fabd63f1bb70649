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
from fedexlora.exchange.shipment import receive, receive_own
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

    def deliver(self, client: str, message: bytes, own: bytes | None) -> None:
        """Bring a client to a version.

        Args:
            client: the client.
            message: from :meth:`fedexlora.exchange.shipment.History.encode`.
            own: from :func:`fedexlora.exchange.shipment.encode_own`.

        Raises:
            RunError: if the client cannot make that version of what it holds; it then holds
                nothing, and takes a total.
        """

    def train(
        self, round_: int, clients: Sequence[str], progress: ClientProgress
    ) -> Iterator[Reply]:
        """Have clients train from the version they hold; replies as they come."""


class InProcessTransport:
    """All clients in this process, one after the other, around one resident model.

    Messages are encoded and decoded as over a network. Clients that hold the same version hold the
    same bits, so that one copy of each version serves them all: what a client has of its own is
    its rows. As many versions are kept as the server has pieces for; a client of an older one gets
    the total, as it would over a network.

    Args:
        model: the resident model.
        clients: tokenised rows by client.
        collator: rows to a padded batch.
        options: fields of ``TrainingArguments``.
        seed: the federation's.
        specs: the adapters of the clients that have another one than the model, by client.
        held: versions by client, from before an interruption.
        versions: those versions.
        window: how many versions are kept.
    """

    def __init__(
        self,
        model: AdaptedModel,
        clients: Mapping[str, Dataset],
        collator: Collator,
        options: Mapping[str, Any],
        seed: int,
        specs: Mapping[str, AdapterSpec],
        *,
        held: Mapping[str, int] | None = None,
        versions: Mapping[int, GlobalState] | None = None,
        window: int = 1,
    ) -> None:
        self._model = model
        self._rows = clients
        self._collator = collator
        self._options = options
        self._seed = seed
        self._specs = specs
        self._held = dict(held or {})
        self._versions = {v: state.common() for v, state in (versions or {}).items()}
        self._own: dict[str, GlobalState] = {}
        self._window = window
        self._decoded: list[tuple[bytes, GlobalState]] = []
        self._applied: int | None = None

    @property
    def clients(self) -> Sequence[str]:
        """The clients in the order of the partition."""
        return tuple(self._rows)

    def deliver(self, client: str, message: bytes, own: bytes | None) -> None:
        """Decode the message once for all clients that get the same one."""
        held = self._versions.get(self._held.pop(client, -1))
        state = next((state for known, state in self._decoded if known is message), None)
        if state is None:
            state = receive(held, message)
            self._decoded.append((message, state))
        self._own[client] = receive_own(state, client, own) if own is not None else state
        self._versions[state.version] = state
        self._held[client] = state.version
        oldest = state.version - self._window
        self._versions = {v: x for v, x in self._versions.items() if v >= oldest}

    def train(
        self, round_: int, clients: Sequence[str], progress: ClientProgress
    ) -> Iterator[Reply]:
        """Train one client after the other, each from its own adapter of its version."""
        for client in clients:
            started = time.perf_counter()
            message, failure = self._attempt(client, round_, progress)
            yield Reply(client, message, failure, time.perf_counter() - started)
        self._own.clear()
        self._decoded.clear()

    def _attempt(
        self, client: str, round_: int, progress: ClientProgress
    ) -> tuple[bytes | None, str]:
        try:
            return self._train_one(client, round_, progress), ""
        except Exception as error:  # noqa: BLE001 - the boundary of a client: its faults are its own
            _log.debug("client %s failed in round %d", client, round_, exc_info=True)
            return None, f"{type(error).__name__}: {error}"

    def _train_one(self, client: str, round_: int, progress: ClientProgress) -> bytes:
        held = self._own[client]
        if self._applied != held.version:
            self._model.apply(held)
            self._applied = held.version
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
