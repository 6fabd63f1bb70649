"""What the server sends: the smaller lossless form of what a receiver misses.

A receiver that holds version ``t - 1`` gets the adapter, the heads and the one piece of remainder
that leads to ``t``; a receiver that holds nothing gets the total. Frozen factors travel once. A
client with an adapter of its own gets that in a second message.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def encode_total(state: GlobalState) -> bytes:
    """A whole version for a receiver that holds nothing."""
    return pack(state_tensors(state.common()), {"version": state.version, "since": None})


def encode_own(state: GlobalState) -> dict[str, bytes]:
    """A message for every client that has an adapter of its own, to follow the common one."""
    return {
        client: pack(adapter_tensors(adapter), {"version": state.version, "client": client})
        for client, adapter in state.own.items()
    }


def encode_step(step: Step) -> bytes:
    """A version for a receiver that holds the one before it."""
    tensors: dict[str, Tensor] = lowrank_tensors("piece", step.pieces)
    tensors |= adapter_tensors(step.state.adapter, step.trained)
    tensors |= {f"dense/{name}": tensor for name, tensor in step.state.dense.items()}
    version = step.state.version
    return pack(tensors, {"version": version, "since": version - 1})


def receive(
    held: GlobalState | None, message: bytes, own: Mapping[str, bytes] | None = None
) -> GlobalState:
    """The version that a receiver holds after ``message``.

    Args:
        held: what the receiver holds; None for nothing. Not written.
        message: from :func:`encode_total` or :func:`encode_step`.
        own: from :func:`encode_own`, for the clients that the receiver stands for.

    Raises:
        RunError: if the message is damaged, or leads from another version than the one held:
            a piece applied twice, or over a gap, would leave the receiver with another model.
    """
    try:
        tensors, header = unpack(message)
        version, since = int(header["version"]), header["since"]
        if since is None:
            state = state_from(version, tensors)
            return replace(state, own=_own_adapters(own or {}, state))
    except (ValueError, KeyError) as error:
        raise RunError(f"a message of the server is damaged: {error}") from error
    if held is None or held.version != since:
        raise RunError(
            f"a message leads from version {since} to {version}, but the receiver holds "
            f"{'nothing' if held is None else f'version {held.version}'}"
        )
    try:
        state = _stepped(held, tensors)
        return replace(state, own=_own_adapters(own or {}, state))
    except (ValueError, KeyError) as error:
        raise RunError(f"a message of the server is damaged: {error}") from error


def _own_adapters(
    messages: Mapping[str, bytes], state: GlobalState
) -> dict[str, dict[str, Factors]]:
    found = {}
    for client, message in messages.items():
        tensors, header = unpack(message)
        if (header["client"], header["version"]) != (client, state.version):
            raise ValueError(f"expected the adapter of {client!r} in version {state.version}")
        found[client] = {
            name: Factors(tensors[f"A/{name}"], tensors[f"B/{name}"]) for name in state.adapter
        }
    return found


def _stepped(held: GlobalState, tensors: Mapping[str, Tensor]) -> GlobalState:
    adapter = {
        name: Factors(tensors.get(f"A/{name}", old.A), tensors.get(f"B/{name}", old.B))
        for name, old in held.adapter.items()
    }
    shapes = {name: matrix.shape for name, matrix in held.total.items()}
    dense = {name: tensors[f"dense/{name}"] for name in held.dense}
    return held.advance(adapter, lowrank_from("piece", tensors, shapes), dense, {})
