"""What server and clients say to each other: a JSON header and named parts, which are bytes.

The parts are the engine's own messages, bit for bit, so that every dtype travels as it is; Flower
cuts them into chunks. Between a client's app and its worker the same frame goes over a socket.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedexlora.exchange.untrusted import json_object
from fedexlora.flower.byte_arrays import to_array, to_bytes

PROTOCOL = 1
"""Of these headers; both sides must speak the same."""
_HEADER, _PARTS, _KEY = "fedexlora.header", "fedexlora.parts", "json"


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    header: Mapping[str, Any]
    """What JSON holds."""
    parts: Mapping[str, bytes] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of header and parts."""
        found = hashlib.sha256(json.dumps([self.header, *self.parts], sort_keys=True).encode())
        for content in self.parts.values():
            found.update(hashlib.sha256(content).digest())
        return found.hexdigest()


def to_records(frame: Frame) -> RecordDict:
    """A frame as Flower's records."""
    arrays = {name: to_array(content) for name, content in frame.parts.items()}
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
        header = json_object(str(records.config_records[_HEADER][_KEY]))
        arrays = records.array_records[_PARTS]
        return Frame(header, {name: to_bytes(name, array) for name, array in arrays.items()})
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a message of fedexlora: {error}") from error


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
