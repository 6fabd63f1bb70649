"""What server and clients say to each other: a JSON header and named parts, which are bytes.

The parts are messages of ``exchange``, bit for bit, so that every dtype travels as it is, in arrays
of bounded size: ``update/0``, ``update/1``, and so on. Between a client's app and its worker the
same frame goes over a socket.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict

from fedexlora.exchange.untrusted import json_object, number, short
from fedexlora.flower.byte_arrays import joined, pieces, to_arrays

PROTOCOL = 4
"""Of these headers; both sides must speak the same."""
_HEADER, _PARTS = "fedexlora.header", "fedexlora.parts"
_KEY, _SIZES = "json", "parts"
"""In the record of the header: the header, and the bytes of every part by name; both are JSON."""
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
    """Characters: a name, a code, and a few numbers. What names the parts may have as many."""
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
    sizes = {name: len(content) for name, content in frame.parts.items()}
    arrays = {
        f"{name}/{i}": array
        for name, content in frame.parts.items()
        for i, array in enumerate(to_arrays(content))
    }
    header = ConfigRecord({_KEY: json.dumps(frame.header), _SIZES: json.dumps(sizes)})
    return RecordDict({_HEADER: header, _PARTS: ArrayRecord(arrays)})


def from_records(records: RecordDict, bounds: Bounds | None = None) -> Frame:
    """What :func:`to_records` made.

    Args:
        records: of a message.
        bounds: what it may hold, held against it before anything is read; None for no bounds.

    Raises:
        ValueError: if the records are something else, or larger.
    """
    # Not by their kinds: the views that Flower makes for that keep a message alive, in a cycle.
    config, arrays = records.get(_HEADER), records.get(_PARTS)
    if not isinstance(config, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise ValueError("not a message of fedexlora: records are missing")
    texts = [config.get(_KEY), config.get(_SIZES)]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError("not a message of fedexlora: its header is no text")
        if bounds is not None and len(text) > bounds.header:
            raise ValueError(f"a header of {len(text)} characters, at most {bounds.header}")
    try:
        header, stated = (json_object(str(text)) for text in texts)
        sizes = {name: number(stated, name) for name in stated}
        if bounds is not None:
            _check_sizes(sizes, bounds)
        return Frame(header, _parts(sizes, arrays))
    except ValueError as error:
        raise ValueError(f"not a message of fedexlora: {error}") from error


def _check_sizes(sizes: Mapping[str, int], bounds: Bounds) -> None:
    """Refuse parts that nobody asked for, or that are larger than agreed.

    Raises:
        ValueError: saying which.
    """
    if more := len(sizes.keys() - bounds.parts.keys()):
        raise ValueError(f"{more} part(s) that nobody asked for")
    for name, size in sizes.items():
        if size > bounds.parts[name]:
            said = f"{name!r}: {size} bytes, expected at most {bounds.parts[name]}"
            raise ValueError(said)


def _parts(sizes: Mapping[str, int], arrays: Mapping[str, Array]) -> dict[str, bytes]:
    """The parts, put together of their pieces.

    Raises:
        ValueError: if a piece is missing, too many, in another place or of another length.
    """
    expected = sum(map(pieces, sizes.values()))
    if len(arrays) != expected:  # before their names are made: of how many is somebody's claim
        raise ValueError(f"{len(arrays)} arrays, expected {expected} for its parts")
    left, parts = iter(arrays.items()), {}
    for name, size in sizes.items():
        found = list(islice(left, pieces(size)))
        for i, (key, _) in enumerate(found):
            if key != f"{name}/{i}":
                raise ValueError(f"expected the array '{name}/{i}', found {short(key)}")
        parts[name] = joined(name, [array for _, array in found], size)
    return parts


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
