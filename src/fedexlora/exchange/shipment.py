"""What the server sends: the smaller lossless form of what a receiver misses.

A receiver that holds version ``v`` gets the adapter and heads of ``t`` and the pieces of remainder
of the rounds between, or the total where that is smaller; one that holds nothing, or a version
that is too old, gets the total. It adds the pieces up one by one, as the server did, so that both
hold the same bits, and compares a fingerprint of them. Frozen factors travel once. A client with
an adapter of its own gets that in a second message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import RunError
from fedexlora.exchange.state import (
    GlobalState,
    adapter_tensors,
    factors_of,
    lowrank_from,
    lowrank_tensors,
    refuse_others,
    state_from,
    state_tensors,
    unpack_state,
)
from fedexlora.exchange.untrusted import number
from fedexlora.exchange.wire import pack

_PIECE = re.compile(r"piece([0-9]+)[./]")
"""How the name of a tensor of a piece begins, with the version that the piece leads to."""


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
    starts: Mapping[int, GlobalState] = field(default_factory=dict)
    """What clients began to train from in those versions, without remainders."""

    def after(self, step: Step) -> History:
        """This history and one more step."""
        version, oldest = step.state.version, step.state.version - self.window
        pieces = {v: p for v, p in self.pieces.items() if v > oldest}
        starts = {v: s for v, s in self.starts.items() if v >= oldest}
        return replace(
            self,
            pieces={**pieces, version: step.pieces},
            starts={**starts, version: step.state.start()},
        )

    def reaches(self, held: int | None, version: int) -> bool:
        """Whether a receiver of a version can be brought to another one by pieces."""
        if held is None or held >= version:
            return False
        return all(v in self.pieces for v in range(held + 1, version + 1))

    def encode(self, state: GlobalState, held: int | None) -> bytes:
        """A version for a receiver that holds ``held``; the smaller of its two forms."""
        fingerprint, whole = state.fingerprint(), state_tensors(state.common())
        if not self.reaches(held, state.version) or held is None:
            return pack(whole, _header(state, None, fingerprint))
        tensors: dict[str, Tensor] = {}
        for version in range(held + 1, state.version + 1):
            tensors |= lowrank_tensors(f"piece{version}", self.pieces[version])
        tensors |= adapter_tensors(state.adapter, self.trained)
        tensors |= {f"dense/{name}": tensor for name, tensor in state.dense.items()}
        steps = pack(tensors, _header(state, held, fingerprint))
        if sum(tensor.nbytes for tensor in whole.values()) >= len(steps):
            return steps  # as a message the total is larger still: it need not be made
        return min(steps, pack(whole, _header(state, None, fingerprint)), key=len)


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
            lost: the clients that held nothing, unless they landed afterwards.
        """
        gone = set(lost)
        kept = {client: v for client, v in self.versions.items() if client not in gone}
        now = dict.fromkeys(landed, step.state.version - 1)
        return Holdings(kept | now, self.history.after(step))


def _header(state: GlobalState, since: int | None, fingerprint: str) -> dict[str, object]:
    return {"version": state.version, "since": since, "fingerprint": fingerprint}


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
            to other bits than the server holds. A receiver that is further than the server knows,
            because its last reply was lost, adds only the pieces that it lacks.
    """
    try:
        tensors, header = unpack_state(message)
        version = number(header, "version")
        since = None if header["since"] is None else number(header, "since")
        if since is None:
            state = state_from(version, tensors)
            refuse_others(tensors, state_tensors(state.common()))
        elif held is None or not since <= held.version <= version:
            raise RunError(
                f"a message leads from version {since} to {version}, but the receiver holds "
                f"{'nothing' if held is None else f'version {held.version}'}"
            )
        else:
            state = _stepped(held.common(), tensors, since, version)
        wanted = header["fingerprint"]
    # RuntimeError: a decomposition of finite numbers that overflow.
    except (ValueError, KeyError, RuntimeError) as error:
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
        tensors, header = unpack_state(message)
        if (header["client"], number(header, "version")) != (client, state.version):
            raise ValueError(f"expected the adapter of {client!r} in version {state.version}")
        adapter = {
            name: factors_of(name, tensors[f"A/{name}"], tensors[f"B/{name}"], common)
            for name, common in state.adapter.items()
        }
        refuse_others(tensors, adapter_tensors(adapter))
    except (ValueError, KeyError) as error:
        raise RunError(f"a message of the server is damaged: {error}") from error
    return replace(state, own={client: adapter})


def _stepped(
    held: GlobalState, tensors: Mapping[str, Tensor], since: int, version: int
) -> GlobalState:
    """A version from one that is at least ``since``: pieces that it has already are passed over."""
    if version <= since:
        raise ValueError(f"it leads from version {since} back to {version}")
    adapter = {}
    for name, old in held.adapter.items():
        a, b = tensors.get(f"A/{name}", old.A), tensors.get(f"B/{name}", old.B)
        adapter[name] = factors_of(name, a, b, old)
    shapes = {name: matrix.shape for name, matrix in held.total.items()}
    dense = {name: tensors[f"dense/{name}"] for name in held.dense}
    known = {*adapter_tensors(adapter), *(f"dense/{name}" for name in dense)}
    # Zero pieces are not sent, and a version may be any number: only what is there is walked over.
    for reached in sorted({int(found[1]) for found in map(_PIECE.match, tensors) if found}):
        if not since < reached <= version:
            continue
        pieces = lowrank_from(f"piece{reached}", tensors, shapes)
        known |= lowrank_tensors(f"piece{reached}", pieces).keys()
        if reached <= held.version:
            continue
        held = replace(held, version=reached - 1).advance(adapter, pieces, dense, {})
    refuse_others(tensors, known)
    return replace(held, version=version, adapter=adapter, dense=dense)
