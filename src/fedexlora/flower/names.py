"""Which node has which name in a run, for as long as the run goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fedexlora.errors import ResumeError, RunError
from fedexlora.exchange.files import replace_bytes
from fedexlora.exchange.untrusted import CLIENT_NAME, json_object, short

FILE = "clients.jsonl"
"""In the run's folder: one line for every name that a node has taken."""
_KEY = r"^[0-9a-z :]{1,80}$"


class Names:
    """The names that nodes have taken: a node has one, and keeps it.

    Where nodes are authenticated a name also has one node, the one that had it first: it belongs to
    the node's key, in a file of the run's folder, until somebody removes its line. Where they are
    not, every start of a node is another key, so that a name is free once its node has gone.

    Args:
        path: the file; None where nodes are not authenticated.

    Raises:
        ResumeError: if there is a file that is not one of names.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._owners: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._durable = False
        if path is not None and path.exists():
            for client, key in _read(path):
                self._owners[client] = key
                self._names[key] = client

    def fault(self, client: str, key: str) -> str:
        """Why the node with this key may not have this name; empty if it may."""
        own = self._names.get(key, client)
        if own != client:
            return f"it is client {own!r} in this run, and cannot be {client!r} too"
        if self._path is not None and self._owners.get(client, key) != key:
            return (
                f"the name {client!r} belongs to another key in this run; to free it, remove its "
                f"line from {self._path} while the run is stopped (where the SuperLink does not "
                f"authenticate nodes, every start is another key: authenticated = false)"
            )
        return ""

    def take(self, client: str, key: str) -> None:
        """Note that a node has a name.

        Raises:
            RunError: if it cannot be made durable.
        """
        known = self._names.get(key) == client
        self._names[key] = client
        self._owners[client] = key
        if self._durable and not known:
            self._write()

    def keep(self) -> None:
        """From now on the run's folder is there: have the names in it.

        Raises:
            RunError: if they cannot be written.
        """
        self._durable = self._path is not None
        if self._durable:
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        lines = (json.dumps({"client": c, "key": k}) + "\n" for c, k in self._owners.items())
        try:
            replace_bytes(self._path, "".join(lines).encode())
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error.strerror}") from error


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path} cannot be read: {error}") from error
    found: list[tuple[str, str]] = []
    faults: list[str] = []
    for i, line in enumerate(lines, 1):
        try:
            found.append(_entry(json_object(line), found))
        except ValueError as error:
            faults.append(f"line {i}: {error}")
    if faults:
        raise ResumeError(f"{path}: {len(faults)} fault(s)", faults)
    return found


def _entry(line: dict[str, object], before: list[tuple[str, str]]) -> tuple[str, str]:
    """A name and its key.

    Raises:
        ValueError: if the line is something else, or one of both was there before.
    """
    client, key = line.get("client"), line.get("key")
    if not isinstance(client, str) or not re.fullmatch(CLIENT_NAME, client):
        raise ValueError(f"expected a client's name, found {short(client)}")
    if not isinstance(key, str) or not re.fullmatch(_KEY, key):
        raise ValueError(f"expected the digest of a key, found {short(key)}")
    if any(client == c or key == k for c, k in before):
        raise ValueError(f"{client!r}, or its key, is in an earlier line too")
    return client, key
