"""What the server sends: the smaller lossless form of what a receiver misses.

A receiver that holds version ``v`` gets the adapter and heads of ``t`` and the pieces of remainder
of the rounds between, or the total where that is smaller; one that holds nothing, or a version
that is too old, gets the total. It adds the pieces up one by one, as the server did, so that both
hold the same bits, and compares a fingerprint of them. Frozen factors travel once. A client with
an adapter of its own gets that in a second message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import RunError
from fedexlora.exchange.state import (
    GlobalState,
    adapter_tensors,
    lowrank_from,
    lowrank_tensors,
    state_from,
    state_tensors,
)
from fedexlora.exchange.wire import pack, unpack


@dataclass(frozen=True, slots=True)
class Step:
    """What leads from one version to the next, as the server keeps it."""

    state: GlobalState
    """The version that is reached."""
    pieces: Mapping[str, LowRank]
    """The remainder of the last round by module, unscaled."""
    trained: tuple[str, ...]
    """The factors that change from version to version."""
    truncated: Mapping[str, float]
    """By module, the norm of what a truncated remainder lacks, unscaled; 0 if nothing was."""


@dataclass(frozen=True, slots=True)
class History:
    """The last pieces, so that clients that come back get no more than what they miss."""

    window: int
    """How many pieces are kept; what is older lives only in the total."""
    pieces: Mapping[int, Mapping[str, LowRank]]
    """By the version that they lead to."""
    trained: tuple[str, ...]
    """The factors that change from version to version."""

    def after(self, step: Step) -> History:
        """This history and one more step."""
        version = step.state.version
        kept = {v: p for v, p in self.pieces.items() if v > version - self.window}
        return replace(self, pieces={**kept, version: step.pieces})

    def reaches(self, held: int | None, version: int) -> bool:
        """Whether a receiver of a version can be brought to another one by pieces."""
        if held is None or held >= version:
            return False
        return all(v in self.pieces for v in range(held + 1, version + 1))

    def encode(self, state: GlobalState, held: int | None) -> bytes:
        """A version for a receiver that holds ``held``; the smaller of its two forms."""
        total = pack(state_tensors(state.common()), _header(state, None))
        if not self.reaches(held, state.version) or held is None:
            return total
        tensors: dict[str, Tensor] = {}
        for version in range(held + 1, state.version + 1):
            tensors |= lowrank_tensors(f"piece{version}", self.pieces[version])
        tensors |= adapter_tensors(state.adapter, self.trained)
        tensors |= {f"dense/{name}": tensor for name, tensor in state.dense.items()}
        steps = pack(tensors, _header(state, held))
        return min(steps, total, key=len)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the server knows of what clients hold."""

    versions: Mapping[str, int]
    """The version that each client landed on last; none for clients that hold nothing."""
    history: History
    """What leads clients from there to the version of now."""

    def after(self, step: Step, landed: Iterable[str], lost: Iterable[str]) -> Holdings:
        """What holds after a round.

        Args:
            step: what the round led to.
            landed: the clients that came to the version that the round started from.
            lost: the clients that hold nothing now.
        """
        gone = set(lost)
        kept = {client: v for client, v in self.versions.items() if client not in gone}
        now = dict.fromkeys(landed, step.state.version - 1)
        return Holdings(kept | now, self.history.after(step))


def _header(state: GlobalState, since: int | None) -> dict[str, object]:
    return {"version": state.version, "since": since, "fingerprint": state.fingerprint()}


def encode_own(state: GlobalState, client: str) -> bytes | None:
    """The adapter of a client that has its own, to follow the common message; else None."""
    if client not in state.own:
        return None
    header = {"version": state.version, "client": client}
    return pack(adapter_tensors(state.own[client]), header)


def receive(held: GlobalState | None, message: bytes) -> GlobalState:
    """The version that a receiver holds after ``message``, without adapters of its own.

    Args:
        held: what the receiver holds; None for nothing. Not written.
        message: from :meth:`History.encode`.

    Raises:
        RunError: if the message is damaged, leads from another version than the one held (a piece
            applied twice, or over a gap, would leave the receiver with another model), or leads
            to other bits than the server holds.
    """
    try:
        tensors, header = unpack(message)
        version, since = int(header["version"]), header["since"]
        if since is None:
            state = state_from(version, tensors)
        elif held is None or held.version != since:
            raise RunError(
                f"a message leads from version {since} to {version}, but the receiver holds "
                f"{'nothing' if held is None else f'version {held.version}'}"
            )
        else:
            state = _stepped(held.common(), tensors, version)
        wanted = header["fingerprint"]
    except (ValueError, KeyError) as error:
        raise RunError(f"a message of the server is damaged: {error}") from error
    if state.fingerprint() != wanted:
        raise RunError(
            f"version {version} came out as another model than the server's: the receiver's "
            f"version {since} is not the server's"
        )
    return state


def receive_own(state: GlobalState, client: str, message: bytes) -> GlobalState:
    """A version with the adapter of a client of its own.

    Raises:
        RunError: if the message is damaged, of another client or another version.
    """
    try:
        tensors, header = unpack(message)
        if (header["client"], header["version"]) != (client, state.version):
            raise ValueError(f"expected the adapter of {client!r} in version {state.version}")
        adapter = {n: Factors(tensors[f"A/{n}"], tensors[f"B/{n}"]) for n in state.adapter}
    except (ValueError, KeyError) as error:
        raise RunError(f"a message of the server is damaged: {error}") from error
    return replace(state, own={client: adapter})


def _stepped(held: GlobalState, tensors: Mapping[str, Tensor], version: int) -> GlobalState:
    adapter = {
        name: Factors(tensors.get(f"A/{name}", old.A), tensors.get(f"B/{name}", old.B))
        for name, old in held.adapter.items()
    }
    shapes = {name: matrix.shape for name, matrix in held.total.items()}
    dense = {name: tensors[f"dense/{name}"] for name in held.dense}
    for reached in range(held.version + 1, version + 1):
        held = held.advance(adapter, lowrank_from(f"piece{reached}", tensors, shapes), dense, {})
    return held
