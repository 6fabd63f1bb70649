"""What server and clients say to each other: a JSON header and named parts, which are bytes.

The parts are the engine's own messages, bit for bit, so that every dtype travels as it is; Flower
cuts them into chunks. Between a client's app and its worker the same frame goes over a socket.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

PROTOCOL = 1
"""Of these headers; both sides must speak the same."""
_HEADER, _PARTS, _KEY = "fedexlora.header", "fedexlora.parts", "json"


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    header: Mapping[str, Any]
    """What JSON holds."""
    parts: Mapping[str, bytes] = field(default_factory=dict)


def to_records(frame: Frame) -> RecordDict:
    """A frame as Flower's records."""
    arrays = {
        name: Array(np.frombuffer(content, dtype=np.uint8)) for name, content in frame.parts.items()
    }
    return RecordDict(
        {
            _HEADER: ConfigRecord({_KEY: json.dumps(frame.header)}),
            _PARTS: ArrayRecord(arrays),
        }
    )


def from_records(records: RecordDict) -> Frame:
    """What :func:`to_records` made.

    Raises:
        ValueError: if the records are something else.
    """
    try:
        header = json.loads(str(records.config_records[_HEADER][_KEY]))
        arrays = records.array_records[_PARTS]
        parts = {name: _bytes(array) for name, array in arrays.items()}
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"not a message of fedexlora: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"not a message of fedexlora: its header is {type(header).__name__}")
    return Frame(header, parts)


def send(connection: Connection, frame: Frame) -> None:
    """Write a frame to a socket."""
    connection.send_bytes(json.dumps([frame.header, list(frame.parts)]).encode())
    for content in frame.parts.values():
        connection.send_bytes(content)


def receive(connection: Connection) -> Frame:
    """Read a frame from a socket.

    Raises:
        EOFError: if the other side has gone.
    """
    header, names = json.loads(connection.recv_bytes())
    return Frame(header, {name: connection.recv_bytes() for name in names})


def _bytes(array: Array) -> bytes:
    content = array.numpy()
    if content.dtype != np.uint8 or content.ndim != 1:
        raise ValueError(f"expected bytes, found {content.dtype} {list(content.shape)}")
    return content.tobytes()
