"""The last answer of a node on its disk, so that a restart loses no training.

    {"request": ..., "header": ..., "parts": {NAME: BYTES}, "sha256": ...}    one line of JSON
    the parts, one after the other

The digest covers header, parts and the request that they answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from typing import BinaryIO

from fedexlora.exchange.files import replace_bytes
from fedexlora.exchange.untrusted import json_object, number
from fedexlora.flower.frames import Frame
from fedexlora.flower.node import Node

_log = logging.getLogger(__name__)
_LONGEST = 4096
"""Bytes of the first line."""


class AnswerFile:
    """The one answer that a node stores, whole or absent; the next one takes its place.

    Args:
        node: the node's configuration. What it allowed when the answer was made it may not allow
            now, so that an answer belongs to the configuration too.
    """

    def __init__(self, node: Node) -> None:
        self._path = node.home / "answer"
        self._node = node.model_dump_json()

    def read(self, request: Frame) -> Frame | None:
        """The answer to a request, if it is the one that is stored.

        A file that cannot be read, or is damaged, is passed over with a line in the node's log.
        """
        try:
            with self._path.open("rb") as file:
                return _read(file, self._key(request))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("%s cannot be read, and is passed over: %s", self._path, error)
            return None

    def write(self, request: Frame, answer: Frame) -> None:
        """Store the answer to a request in the place of the one before.

        Where the disk does not take it, a line in the node's log says so: a request that comes
        again is then trained again.
        """
        key = self._key(request)
        line = {
            "request": key,
            "header": dict(answer.header),
            "parts": {name: len(content) for name, content in answer.parts.items()},
            "sha256": _digest(key, answer),
        }
        content = b"".join([json.dumps(line).encode(), b"\n", *answer.parts.values()])
        try:
            replace_bytes(self._path, content)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._path, error.strerror)

    def _key(self, request: Frame) -> str:
        """What tells a request from others.

        That is its header, with recipe, run, round and the id of the version. How the client comes
        to that version is another matter: a server that was resumed may send steps where it sent a
        snapshot, or pack them in other bytes.
        """
        header = {key: value for key, value in request.header.items() if key != "snapshot"}
        said = f"{Frame(header).digest()} {self._node}"
        return hashlib.sha256(said.encode()).hexdigest()


def _read(file: BinaryIO, key: str) -> Frame | None:
    """The answer in a file, of which nothing but the first line is read for another request.

    Raises:
        ValueError: if it is damaged.
    """
    line = json_object(file.readline(_LONGEST))
    if line.get("request") != key:
        return None
    header, sizes = line.get("header"), line.get("parts")
    if not isinstance(header, dict) or not isinstance(sizes, dict):
        raise ValueError("its first line is none of an answer")
    lengths = {name: number(sizes, name) for name in sizes}
    if sum(lengths.values()) != os.fstat(file.fileno()).st_size - file.tell():
        raise ValueError("it is cut off, or something follows")
    answer = Frame(header, {name: file.read(length) for name, length in lengths.items()})
    if line.get("sha256") != _digest(key, answer):
        raise ValueError("its content does not have the digest that it was written with")
    return answer


def _digest(key: str, answer: Frame) -> str:
    return hashlib.sha256(f"{key} {answer.digest()}".encode()).hexdigest()
