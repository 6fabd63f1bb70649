"""What leads from one version to the next, as data: all that is sent, stored and hashed.

    digest(step) = tree over adapter    the factors that are trained, as sent
                             heads      heads and biases
                             own        by client, the adapters of those that have their own
                             remainder  by module, the piece of remainder; zero pieces are none

A step has the factors that its round changed, both or one of them; heads, if it changed any. A
receiver that skips a version gets its pieces, and the digests of the parts that it has no use for:
of a version that nobody holds any more, that is what a later one replaces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.errors import DigestError
from fedexlora.exchange.digest import group, known_digest, tensors_digest
from fedexlora.exchange.layout import (
    adapter_tensors,
    dense_from,
    dense_tensors,
    lowrank_from,
    lowrank_tensors,
)
from fedexlora.exchange.untrusted import short
from fedexlora.exchange.version import Adapter, next_id

PIECE = torch.float32
"""The dtype of pieces: a round's remainder is rounded once, and added up in float64."""
_OF_STEP = re.compile(r"(piece|step)([0-9]+)[./]")
"""How the name of a tensor begins that is a piece of a step, or a part of one before the last."""
_PARTS = ("A/", "B/", "dense/")


@dataclass(frozen=True, slots=True)
class StepDigests:
    """The digests of a step's parts."""

    adapter: str
    heads: str
    own: str
    """Of all clients that have an adapter of their own in the version that is reached."""
    remainder: str

    @property
    def whole(self) -> str:
        """The digest of the step."""
        parts = {"adapter": self.adapter, "heads": self.heads}
        return group({**parts, "own": self.own, "remainder": self.remainder})

    def to_json(self) -> list[str]:
        """As a list, for a header."""
        return [self.adapter, self.heads, self.own, self.remainder]

    @staticmethod
    def from_json(value: object) -> StepDigests:
        """What :meth:`to_json` made.

        Raises:
            ValueError: if it is something else.
        """
        if not isinstance(value, list) or len(value) != 4:
            raise ValueError(f"expected the four digests of a step, found {short(value)}")
        return StepDigests(*map(known_digest, value))


@dataclass(frozen=True)  # no slots: the id is kept
class Step:
    """Step ``t``; of a version that is skipped, without what later steps replace."""

    version: int
    """The version that it leads to."""
    previous: str
    """The id of the version before."""
    factors: Mapping[str, Tensor]
    """The factors that it changes, by ``A/MODULE`` and ``B/MODULE``."""
    dense: Mapping[str, Tensor]
    """Heads and biases, by name; none where they stay as they are."""
    pieces: Mapping[str, LowRank]
    """What is added to the cumulative remainder, by module, unscaled, float32."""
    digests: StepDigests
    own: Mapping[str, Adapter]
    """The adapters of clients of their own that are others than in the version before, each under
    the name of the first client that has it."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """By client of whose adapter another one has the name: that one."""

    @cached_property
    def id(self) -> str:
        """The id of the version that it leads to."""
        return next_id(self.previous, self.digests.whole)

    def adapter(self, held: Adapter) -> dict[str, Factors]:
        """The adapter of the version that it leads to; factors that it lacks come from ``held``.

        Raises:
            ValueError: if a factor has another shape than the module, or is of none.
        """
        return joined(self.factors, held)


def joined(factors: Mapping[str, Tensor], held: Adapter) -> dict[str, Factors]:
    """Factors of a message, and those of ``held`` that it lacks.

    Raises:
        ValueError: if a factor has another shape than the module, or is of none.
    """
    found = {}
    for name, old in held.items():
        pair = Factors(factors.get(f"A/{name}", old.A), factors.get(f"B/{name}", old.B))
        if pair.shape != old.shape:
            raise ValueError(f"factors of {name}: expected {old.shape}, found {pair.shape}")
        found[name] = pair
    if others := factors.keys() - adapter_tensors(held).keys():
        raise ValueError(f"factors of no module: {short(sorted(others))}")
    return found


def remainder_digest(pieces: Mapping[str, LowRank]) -> str:
    """The digest of a step's pieces, by module; their version is that of the step."""
    return group(
        {
            name: tensors_digest(lowrank_tensors("piece", {name: piece}))
            for name, piece in pieces.items()
            if not piece.is_zero
        }
    )


def encode_steps(steps: Sequence[Step]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Steps that follow each other as tensors and fields of a header.

    Factors and heads are those of the last step that has them; own adapters are not in it.
    """
    tensors: dict[str, Tensor] = {}
    adapters, heads = _needed([_letters(step) for step in steps]), _last_heads(steps)
    for place, step in enumerate(steps):
        parts: dict[str, Tensor] = dict(step.factors) if place in adapters else {}
        if place == heads:
            parts |= dense_tensors(step.dense)
        last = place == len(steps) - 1
        tensors |= parts if last else {f"step{step.version}/{x}": t for x, t in parts.items()}
        tensors |= lowrank_tensors(f"piece{step.version}", step.pieces)
    header = {"since_id": steps[0].previous, "steps": [step.digests.to_json() for step in steps]}
    return tensors, header


def _letters(step: Step) -> set[str]:
    """The factors that a step changes, of ``A`` and ``B``."""
    return {name[0] for name in step.factors}


def _needed(letters: Sequence[set[str]]) -> set[int]:
    """The places of the steps whose factors are not all replaced by later ones."""
    found, replaced = set(), set[str]()
    for place in reversed(range(len(letters))):
        if letters[place] - replaced:
            found.add(place)
        replaced |= letters[place]
    return found


def _last_heads(steps: Sequence[Step]) -> int:
    """The place of the last step that has heads; -1 if none has."""
    return max((place for place, step in enumerate(steps) if step.dense), default=-1)


def decode_steps(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any], since: int
) -> tuple[Step, ...]:
    """What :func:`encode_steps` made, of steps that begin after version ``since``.

    Raises:
        ValueError: if something is missing, left over or of another kind.
        DigestError: if a part has another digest than the one that it was announced with.
    """
    if not isinstance(header["steps"], list) or not header["steps"]:
        raise ValueError(f"header 'steps': expected a list, found {short(header['steps'])}")
    announced = [StepDigests.from_json(value) for value in header["steps"]]
    previous = known_digest(header["since_id"])
    versions = range(since + 1, since + 1 + len(announced))
    parts, pieces = _parts(tensors, versions)
    steps: list[Step] = []
    for version, digests in zip(versions, announced, strict=True):
        own = parts.get(version, {})
        factors = {name: t for name, t in own.items() if name.startswith(("A/", "B/"))}
        found = pieces.get(version, {})
        step = Step(version, previous, factors, dense_from(own), found, digests, {})
        check_parts(step, _found_digests(step, whole=version == versions[-1]))
        steps.append(step)
        previous = step.id
    return tuple(steps)


def _found_digests(step: Step, *, whole: bool) -> dict[str, str]:
    """The digests of what arrived of a step; of the last one, all of it has."""
    found = {"remainder": remainder_digest(step.pieces)}
    if whole or step.factors:
        found["adapter"] = tensors_digest(step.factors)
    if whole or step.dense:
        found["heads"] = tensors_digest(dense_tensors(step.dense))
    return found


def check_parts(step: Step, found: Mapping[str, str]) -> None:
    """Hold the parts of a step that arrived against their digests.

    Args:
        step: the step.
        found: digests of ``adapter``, ``heads`` and ``remainder``, or some of them.

    Raises:
        DigestError: naming every part that has another one.
    """
    faults = [
        f"{part}: expected {wanted}, found {there}"
        for part, there in found.items()
        if (wanted := getattr(step.digests, part)) != there
    ]
    if faults:
        raise DigestError(f"step {step.version} has not the digest that was announced", faults)


def _parts(
    tensors: Mapping[str, Tensor], versions: range
) -> tuple[dict[int, dict[str, Tensor]], dict[int, dict[str, LowRank]]]:
    """What a message has by version: factors and heads by name, and pieces by module.

    Raises:
        ValueError: if it has anything else.
    """
    parts: dict[int, dict[str, Tensor]] = {}
    grouped: dict[int, dict[str, Tensor]] = {}
    odd = []
    for name, tensor in tensors.items():
        match = _OF_STEP.match(name)
        version = int(match[2]) if match and len(match[2]) < 20 else versions[-1]
        rest = name if match is None else name[match.end() :]
        if match and version in versions and match[1] == "piece" and tensor.dtype == PIECE:
            grouped.setdefault(version, {})[name] = tensor
        elif (match is None or match[1] == "step") and rest.startswith(_PARTS):
            if match and version not in versions[:-1]:
                odd.append(name)
            parts.setdefault(version, {})[rest] = tensor
        else:
            odd.append(name)
    pieces = {version: lowrank_from(f"piece{version}", found) for version, found in grouped.items()}
    known = {n for v, found in pieces.items() for n in lowrank_tensors(f"piece{v}", found)}
    odd += [name for found in grouped.values() for name in found if name not in known]
    if odd:
        raise ValueError(f"unexpected tensors: {short(sorted(odd))}")
    return parts, pieces
