"""What server and clients say to each other: a JSON header and named parts, which are bytes.

The parts are messages of ``exchange``, bit for bit, so that every dtype travels as it is; Flower
cuts them into chunks. Between a client's app and its worker the same frame goes over a socket.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Error, RecordDict

from fedexlora.exchange.untrusted import json_object
from fedexlora.flower.byte_arrays import to_array, to_bytes

PROTOCOL = 2
"""Of these headers; both sides must speak the same."""
_HEADER, _PARTS, _KEY = "fedexlora.header", "fedexlora.parts", "json"
_FLOWER = {
    1: "its app could not be loaded",
    2: "its app raised an error",
    3: "the message is gone",
    4: "its reply is gone",
    5: "node unavailable",
    6: "its app was stopped by a modifier",
    7: "the app's bundle is damaged",
    8: "the process of the message did not start in time, or stopped",
}
"""Flower's codes; they are not public."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a message may hold that comes from somebody else."""

    header: int = 4096
    """Characters: a name, a code, and a few numbers."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """The bytes of each part; another one is refused."""


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


def from_records(records: RecordDict, bounds: Bounds | None = None) -> Frame:
    """What :func:`to_records` made.

    Args:
        records: of a message.
        bounds: what it may hold, held against it before anything is read; None for no bounds.

    Raises:
        ValueError: if the records are something else, or larger.
    """
    try:
        text = records.config_records[_HEADER][_KEY]
        arrays = records.array_records[_PARTS]
    except KeyError as error:
        raise ValueError("not a message of fedexlora: records are missing") from error
    if not isinstance(text, str):
        raise ValueError("not a message of fedexlora: its header is no text")
    parts: Mapping[str, int | None] = dict.fromkeys(arrays)
    if bounds is not None:
        parts = bounds.parts
        if len(text) > bounds.header:
            raise ValueError(f"a header of {len(text)} characters, at most {bounds.header}")
        if more := len(arrays.keys() - parts.keys()):
            raise ValueError(f"{more} part(s) that nobody asked for")
    try:
        header = json_object(text)
        return Frame(header, {name: to_bytes(name, a, parts[name]) for name, a in arrays.items()})
    except ValueError as error:
        raise ValueError(f"not a message of fedexlora: {error}") from error


def error_text(error: Error) -> str:
    """Why Flower has no reply of a node: by its code, as the reason may be the node's own text."""
    return f"{_FLOWER.get(error.code, 'no reply')} (Flower's code {int(error.code)})"


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
