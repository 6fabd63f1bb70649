"""What brings one client to the version of now: the steps that it lacks, or a snapshot.

A client that holds version ``v`` gets the pieces of every step from there, the adapter and heads of
the last one, and digests of what it does not need; one that holds nothing, or a version that is
older than the history, gets a snapshot. A client with an adapter of its own gets that beside it.
What the message must lead to is announced in the request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from fedexlora.errors import DigestError, GapError, VersionError
from fedexlora.exchange.digest import branch_of, climb, known_digest
from fedexlora.exchange.history import History
from fedexlora.exchange.layout import adapter_tensors, unpack_finite
from fedexlora.exchange.snapshot import decode_snapshot, encode_snapshot
from fedexlora.exchange.state import GlobalState, adapter_from, missing_steps, own_adapter
from fedexlora.exchange.step import Step, decode_steps, encode_steps
from fedexlora.exchange.untrusted import number, short
from fedexlora.exchange.version import adapter_digest
from fedexlora.exchange.wire import pack


class Announcement(NamedTuple):
    """What a request says that its message leads to."""

    id: str
    """The id of the version."""
    snapshot: str | None
    """The digest of the snapshot, if the message is one."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the server sends to one client."""

    state: GlobalState
    """The version that the client comes to."""
    announced: Announcement
    message: bytes
    own: bytes | None = None
    """The adapter of a client that has its own."""

    @property
    def size(self) -> int:
        """Bytes of both messages."""
        return len(self.message) + len(self.own or b"")

    def to(self, client: str) -> Delivery:
        """This delivery with the adapter of a client, if it has its own."""
        return replace(self, own=encode_own(self.state, client))


@dataclass(frozen=True, slots=True)
class Passage:
    """What leads to a version, decoded: all of it has the digests that were announced."""

    steps: tuple[Step, ...]
    """One after the other; none if there is a snapshot."""
    snapshot: GlobalState | None
    own: str
    """The digest of the clients' own adapters in the version that is reached."""

    def check(self, version: int | None, id_: str | None) -> None:
        """See to it that the steps lead on from what is held; from a snapshot anything does.

        Args:
            version: what is held; None for nothing.
            id_: its id.

        Raises:
            GapError: if there is a gap between the two.
            HistoryError: if they are of another history.
        """
        if self.snapshot is not None:
            return
        if version is None or id_ is None:
            raise self._from_nothing()
        missing_steps(version, id_, self.steps)

    def lead(self, held: GlobalState | None) -> GlobalState:
        """The version that a receiver comes to.

        Raises:
            VersionError: if it holds something that the steps do not lead on from.
        """
        if self.snapshot is not None:
            return self.snapshot
        if held is None:
            raise self._from_nothing()
        return held.advance(self.steps)

    def _from_nothing(self) -> GapError:
        first, last = self.steps[0].version - 1, self.steps[-1].version
        said = f"steps lead from version {first} to {last}, but the receiver holds nothing"
        return GapError(said)


def deliver(
    history: History, state: GlobalState, held: int | None, *, bitwise: bool = False
) -> Delivery:
    """What brings a client to a version, but for an adapter of its own.

    Args:
        history: the steps that clients can still be sent.
        state: the version.
        held: the version that the client holds; None for nothing.
        bitwise: if it takes a snapshot, that one has the server's bits.

    Raises:
        VersionError: if a step cannot be read from the store.
    """
    header: dict[str, object] = {"version": state.version, "id": state.id}
    if held is None or not history.reaches(held, state.version):
        tensors, more, digest = encode_snapshot(state, bitwise=bitwise)
        message = pack(tensors, {**header, "since": None, **more})
        return Delivery(state, Announcement(state.id, digest), message)
    tensors, more = encode_steps(history.steps(held, state.version))
    message = pack(tensors, {**header, "since": held, **more})
    return Delivery(state, Announcement(state.id, None), message)


def open_message(message: bytes, announced: Announcement) -> Passage:
    """Decode what :func:`deliver` made, and hold it against what was announced.

    Raises:
        VersionError: if it is damaged, or leads to another version.
        DigestError: if a part of a step has another digest.
        SnapshotError: if it is another snapshot.
    """
    try:
        tensors, header = unpack_finite(message)
        version, id_ = number(header, "version"), known_digest(header["id"])
        if id_ != announced.id:
            raise DigestError(f"a message leads to another version than {announced.id}")
        if (header["since"] is None) != (announced.snapshot is not None):
            raise ValueError("a snapshot where steps were announced, or the other way round")
        if announced.snapshot is not None:
            _only(header, {"version", "id", "since", "own"})
            known = known_digest(announced.snapshot)
            state, own = decode_snapshot(tensors, header, version, id_, known)
            return Passage((), state, own)
        return _steps(tensors, header, version, id_)
    # RuntimeError: a decomposition of finite numbers that overflow.
    except (ValueError, KeyError, RuntimeError) as error:
        raise VersionError(f"a message of the server is damaged: {error}") from error


def receive(
    held: GlobalState | None,
    announced: Announcement,
    message: bytes,
    own: bytes | None = None,
    client: str = "",
) -> GlobalState:
    """The version that a receiver comes to.

    Args:
        held: what the receiver holds; None for nothing. Not written.
        announced: of the request.
        message: of a :class:`Delivery`.
        own: the adapter of its own that came with it.
        client: whose that is.

    Raises:
        VersionError: if a message is damaged, or leads from something that the receiver does not
            hold. A receiver that is further than the server knows, because its last reply was
            lost, takes only the steps that it lacks.
        DigestError: if a part has another digest than was announced.
        SnapshotError: if it is another snapshot than was announced.
    """
    passage = open_message(message, announced)
    state = passage.lead(held)
    return state if own is None else with_own(state, own, client, passage.own)


def encode_own(state: GlobalState, client: str) -> bytes | None:
    """The adapter of a client that has its own; None for all others."""
    if client not in state.own:
        return None
    branch = branch_of(state.own_digests, client)
    header = {"version": state.version, "client": client, "branch": branch}
    return pack(adapter_tensors(state.own[client]), header)


def with_own(state: GlobalState, message: bytes, client: str, digest: str) -> GlobalState:
    """A version with the adapter of a client of its own.

    Args:
        state: the version.
        message: from :func:`encode_own`.
        client: whose it must be.
        digest: of all clients' own adapters in the version.

    Raises:
        VersionError: if the message is damaged, of another client or another version.
        DigestError: if it is not the adapter that belongs to the version.
    """
    try:
        tensors, header = unpack_finite(message)
        if (header["client"], number(header, "version")) != (client, state.version):
            raise ValueError(f"expected the adapter of {client!r} in version {state.version}")
        _only(header, {"version", "client", "branch"})
        if not isinstance(header["branch"], list):
            raise ValueError(f"header 'branch': expected a list, found {short(header['branch'])}")
        adapter = own_adapter(adapter_from(tensors), state.adapter)
        if adapter_tensors(adapter).keys() != tensors.keys():
            raise ValueError(f"unexpected tensors: {short(sorted(tensors))}")
        found = climb(client, adapter_digest(adapter), header["branch"])
    except (ValueError, KeyError) as error:
        raise VersionError(f"a message of the server is damaged: {error}") from error
    if found != digest:
        raise DigestError(
            f"the adapter of {client} in version {state.version} has not its digest",
            [f"own: expected {digest}, found {found}"],
        )
    return replace(state, own={client: adapter})


def _steps(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any], version: int, id_: str
) -> Passage:
    _only(header, {"version", "id", "since", "since_id", "steps"})
    since = number(header, "since")
    steps = decode_steps(tensors, header, since)
    if steps[-1].version != version:
        raise ValueError(f"its steps lead to version {steps[-1].version}, not {version}")
    if steps[-1].id != id_:
        raise DigestError(
            f"the steps from version {since} do not lead to the version that was announced",
            [f"id: expected {id_}, found {steps[-1].id}"],
        )
    return Passage(steps, None, steps[-1].digests.own)


def _only(header: Mapping[str, Any], known: set[str]) -> None:
    if header.keys() != known:
        raise ValueError(f"header: expected {sorted(known)}, found {short(sorted(header))}")
