"""A step whose tensors are in a file: each is read when it is asked for, and none is held."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import DigestError
from fedexlora.exchange.digest import group, known_digest
from fedexlora.exchange.digest_file import DigestFile
from fedexlora.exchange.layout import MEMORY, MEMORY_PARTS, lowrank_from
from fedexlora.exchange.step import PIECE, Step, StepDigests, check_parts
from fedexlora.exchange.tensors import LazyMapping, TensorFile
from fedexlora.exchange.untrusted import number, short
from fedexlora.exchange.version import Adapter

PREFIX = "piece"
"""How the names of a step's own pieces begin in its file."""
_REMEMBERED = {f"{MEMORY}.{part}": part for part in MEMORY_PARTS}

Names = dict[str, None]
"""Names in the order of the file."""


@dataclass(frozen=True, slots=True)
class StoredStep:
    """A step that was read, and what its round changed of what clients hold."""

    step: Step
    held: Mapping[str, int | None]
    """By client, the version; None for nothing."""
    memory: Mapping[str, Mapping[str, Tensor]]
    """What the server remembers for the next round, by module."""


def read_step(path: Path) -> StoredStep:
    """A stored step, held against its digests in one pass over the file.

    The own adapters of clients are held against theirs by whoever knows the version before.

    Raises:
        ValueError: if it is no step, or is damaged.
        KeyError: if its header lacks a field.
        OSError: if it cannot be read.
        DigestError: if a part has another digest than its header says.
    """
    whole = DigestFile.open(path)
    stored = _stored(whole)
    parts: dict[str, dict[str, str]] = {"adapter": {}, "heads": {}}
    memory: dict[str, str] = {}
    pieces: dict[str, dict[str, str]] = {}
    for name, digest in whole.digests().items():
        kind, _, module = name.partition("/")
        if kind in ("A", "B"):
            parts["adapter"][name] = digest
        elif kind == "dense":
            parts["heads"][name] = digest
        elif kind.startswith(PREFIX):
            pieces.setdefault(module, {})[name] = digest
        elif kind.startswith(MEMORY):
            memory[name] = digest
    if group(memory) != known_digest(whole.header["memory"]):
        raise DigestError(f"the server's memory of step {stored.step.version} is damaged", [])
    found = {part: group(digests) for part, digests in parts.items()}
    found["remainder"] = group({module: group(digests) for module, digests in pieces.items()})
    check_parts(stored.step, found)
    return stored


def open_step(path: Path) -> StoredStep:
    """A stored step by its header alone, for receivers that hold it against its digests.

    Raises:
        ValueError: if it is no step, or its header is damaged.
        KeyError: if its header lacks a field.
        OSError: if it cannot be read.
    """
    return _stored(DigestFile.open(path))


def _stored(whole: DigestFile) -> StoredStep:
    file, header = whole.file, whole.header
    factors, dense, pieces, own, memory = _contents(file)
    version = number(header, "version")
    step = Step(
        version,
        known_digest(header["previous"]),
        LazyMapping(file.read, factors),
        LazyMapping(lambda name: file.read(f"dense/{name}"), dense),
        LazyMapping(partial(_piece, file, pieces), pieces),
        StepDigests.from_json(header["digests"]),
        LazyMapping(partial(_own, file, own), own),
        shared_in(header, own),
    )
    if step.id != header["id"]:
        raise ValueError(f"it has not the id of version {version}")
    remembered = LazyMapping(partial(_remembered, file, memory), memory)
    return StoredStep(step, _held(header, version), remembered)


def _contents(
    file: TensorFile,
) -> tuple[Names, Names, dict[str, list[str]], dict[str, Names], dict[str, Names]]:
    """What a file has: factors, heads, and by module or client the tensors of all else.

    Raises:
        ValueError: if it has something else.
    """
    factors: Names = {}
    dense: Names = {}
    pieces: dict[str, list[str]] = {}
    own: dict[str, Names] = {}
    memory: dict[str, Names] = {}
    odd = []
    for key, spec in file.tensors.items():
        kind, _, name = key.partition("/")
        if kind in ("A", "B"):
            factors[key] = None
        elif kind == "dense":
            dense[name] = None
        elif kind in (PREFIX, f"{PREFIX}.A", f"{PREFIX}.B") and spec.dtype == PIECE:
            pieces.setdefault(name, []).append(key)
        elif kind in ("own.A", "own.B"):
            module, _, client = name.partition("/")
            own.setdefault(client, {})[module] = None
        elif kind in _REMEMBERED:
            memory.setdefault(name, {})[_REMEMBERED[kind]] = None
        else:
            odd.append(key)
    if odd:
        raise ValueError(f"unexpected tensors: {short(sorted(odd))}")
    return factors, dense, pieces, own, memory


def _piece(file: TensorFile, pieces: Mapping[str, list[str]], module: str) -> LowRank:
    found = lowrank_from(PREFIX, {key: file.read(key) for key in pieces[module]})
    return found[module]


def _remembered(file: TensorFile, memory: Mapping[str, Names], module: str) -> Mapping[str, Tensor]:
    return {part: file.read(f"{MEMORY}.{part}/{module}") for part in memory[module]}


def _own(file: TensorFile, own: Mapping[str, Names], client: str) -> Adapter:
    return {
        module: Factors(
            file.read(f"own.A/{module}/{client}"), file.read(f"own.B/{module}/{client}")
        )
        for module in own[client]
    }


def shared_in(header: Mapping[str, Any], own: Collection[str]) -> dict[str, str]:
    """Who has the adapter of another client, by the header of a file.

    Args:
        header: of the file.
        own: the clients under whose names there are adapters.

    Raises:
        ValueError: if one has the adapter of nobody, or two.
    """
    shared = header["shared"]
    if not isinstance(shared, dict) or not all(isinstance(x, str) for x in shared.values()):
        raise ValueError(f"header 'shared': expected clients by client, found {short(shared)}")
    if odd := [c for c, name in shared.items() if c in own or name not in own]:
        raise ValueError(f"header 'shared': no one adapter is that of {short(sorted(odd))}")
    return shared


def _held(header: Mapping[str, Any], version: int) -> dict[str, int | None]:
    held = header["held"]
    if not isinstance(held, dict):
        raise ValueError(f"header 'held': expected an object, found {short(held)}")
    found = {client: v if v is None else number(held, client) for client, v in held.items()}
    if any(v is not None and v >= version for v in found.values()):
        raise ValueError(f"its header is not one of version {version}")
    return found
