"""A version whole as a file: written and held against its digests one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedexlora.errors import SnapshotError
from fedexlora.exchange.digest import group, known_digest
from fedexlora.exchange.digest_file import DigestFile, DigestWriter, header_room
from fedexlora.exchange.files import beside, rename
from fedexlora.exchange.state import GlobalState, state_from, state_tensors
from fedexlora.exchange.step_file import shared_in
from fedexlora.exchange.untrusted import number, short

_PARTS = ("adapter", "heads", "own", "total")


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """A version that was read, and what clients held then."""

    state: GlobalState
    held: Mapping[str, int]


def write_snapshot(path: Path, state: GlobalState, held: Mapping[str, int]) -> None:
    """Write a version; the file is whole or absent.

    Args:
        path: the file.
        state: the version.
        held: by client, the version that it holds.

    Raises:
        OSError: if it cannot be written; nothing is left then.
    """
    tensors, shared = state_tensors(state), state.shared
    texts = [*held, *(f"{client}{name}" for client, name in shared.items())]
    file = DigestWriter(beside(path), tensors, header_room(texts))
    try:
        found = {name: file.add(name, tensor) for name, tensor in tensors.items()}
        said = {"version": state.version, "id": state.id, "held": dict(held)}
        said |= {"shared": shared}
        file.finish({**said, "digests": _digests(found)})
        rename(beside(path), path)
    except BaseException:
        file.abandon()
        raise


def read_snapshot(path: Path, *, total: bool = True) -> StoredSnapshot:
    """Read a version, and hold it against its digests.

    Args:
        path: the file.
        total: read the cumulative remainder, too; else there is none in the version.

    Raises:
        ValueError: if it is no snapshot, or is damaged.
        KeyError: if its header lacks a field.
        OSError: if it cannot be read.
        SnapshotError: if a part has another digest than its header says.
    """
    whole = DigestFile.open(path)
    tensors: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    parts = [part for part in _PARTS if total or part != "total"]
    for name, tensor, digest in whole.tensors(lambda name: _part(name) in parts):
        tensors[name], digests[name] = tensor, digest
    version = number(whole.header, "version")
    announced = _announced(whole.header)
    faults = [
        f"{part}: expected {announced[part]}, found {there}"
        for part, there in _digests(digests).items()
        if part in parts and there != announced[part]
    ]
    if faults:
        raise SnapshotError(f"the snapshot of version {version} has not its digest", faults)
    own = {name.rpartition("/")[2] for name in tensors if _part(name) == "own"}
    shared = shared_in(whole.header, own)
    state = state_from(version, known_digest(whole.header["id"]), tensors, shared)
    return StoredSnapshot(state if total else replace(state, total={}), _held(whole.header))


def _digests(tensors: Mapping[str, str]) -> dict[str, str]:
    """The digests of a version's parts, from those of its tensors."""
    parts: dict[str, dict[str, str]] = {part: {} for part in _PARTS}
    for name, digest in tensors.items():
        parts[_part(name)][name] = digest
    return {part: group(digests) for part, digests in parts.items()}


def _part(name: str) -> str:
    """Which part of a version a tensor belongs to.

    Raises:
        ValueError: if it belongs to none.
    """
    kind = name.partition("/")[0]
    kinds = {"A": "adapter", "B": "adapter", "dense": "heads", "own.A": "own", "own.B": "own"}
    part = kinds | {"total": "total", "total.A": "total", "total.B": "total"}
    if kind not in part:
        raise ValueError(f"unexpected tensors: {short([name])}")
    return part[kind]


def _announced(header: Mapping[str, Any]) -> dict[str, str]:
    found = header["digests"]
    if not isinstance(found, dict) or found.keys() != set(_PARTS):
        raise ValueError(f"header 'digests': expected those of {_PARTS}, found {short(found)}")
    return {part: known_digest(found[part]) for part in _PARTS}


def _held(header: Mapping[str, Any]) -> dict[str, int]:
    held, version = header["held"], number(header, "version")
    if not isinstance(held, dict):
        raise ValueError(f"header 'held': expected an object, found {short(held)}")
    found = {client: number(held, client) for client in held}
    if any(v >= version for v in found.values()):
        raise ValueError(f"its header is not one of version {version}")
    return found
