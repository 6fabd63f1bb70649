"""What travels between strategy and clients: one packed message in one ``ArrayRecord``.

Flower's arrays know no bfloat16 and carry neither scalings nor checksums, so that a message is the
bytes of :mod:`fedexlora.exchange.wire`, as one uint8 array. The two directions have different
keys: what would treat the bytes as numbers, as Flower's modifiers for differential privacy do,
finds keys that do not match, and a client that sends back what it got is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ArrayRecord

from fedexlora.errors import RunError
from fedexlora.exchange.digest import known_digest
from fedexlora.exchange.layout import unpack_finite
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec, TensorSpec
from fedexlora.exchange.state import GlobalState, state_from, state_tensors
from fedexlora.exchange.untrusted import number, short
from fedexlora.exchange.wire import pack
from fedexlora.flower.byte_arrays import to_array, to_bytes
from fedexlora.methods.fedex import FEDEX

GLOBAL = "fedexlora-global-model"
"""The key of what the server sends."""
UPDATE = "fedexlora-update"
"""The key of what a client sends."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A version of the global model, and what its updates must be like."""

    state: GlobalState
    """Without adapters of clients' own."""
    spec: AdapterSpec
    base: str
    """Fingerprint of the base model."""


def pack_shared(shared: Shared) -> ArrayRecord:
    """A version as the one array of a record; the server needs no model to read it."""
    header = {
        "version": shared.state.version,
        "id": shared.state.id,
        "base": shared.base,
        "scaling": {name: module.scaling for name, module in shared.spec.modules.items()},
    }
    return byte_record(GLOBAL, pack(state_tensors(shared.state), header))


def unpack_shared(record: ArrayRecord) -> Shared:
    """What :func:`pack_shared` made; its factors are both trained.

    Raises:
        RunError: if the record is empty, damaged or was made by something else.
    """
    try:
        tensors, header = unpack_finite(read_bytes(record, GLOBAL))
        state = state_from(number(header, "version"), known_digest(header["id"]), tensors)
        modules = {
            name: ModuleSpec(*pair.shape, pair.rank, pair.dtype, float(header["scaling"][name]))
            for name, pair in state.adapter.items()
        }
        dense = {name: TensorSpec.of(tensor) for name, tensor in state.dense.items()}
        return Shared(
            state, AdapterSpec(modules, dense, FEDEX.default.factors), str(header["base"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"the arrays hold no version of a global model: {error}") from error


def byte_record(key: str, message: bytes) -> ArrayRecord:
    """``message`` as one uint8 array."""
    return ArrayRecord({key: to_array(message)})


def read_bytes(record: ArrayRecord, key: str, most: int | None = None) -> bytes:
    """The message under ``key``.

    Args:
        record: of a message.
        key: of its one array.
        most: the bytes that it may have; any number by default.

    Raises:
        ValueError: if the record has other keys, another array than one of bytes, or a larger one.
    """
    if list(record) != [key]:
        raise ValueError(f"expected one array {key!r}, found {_some(list(record))}")
    return to_bytes(key, record[key], most)


def _some(keys: list[str]) -> str:
    """The first of many keys: an adapter's state dict has hundreds."""
    shown = ", ".join(short(key) for key in keys[:3])
    return f"{len(keys)}: {shown}{', ...' if len(keys) > 3 else ''}" if keys else "none"
