"""Digests of tensors as a tree, so that whoever has only a part can check that part.

    tensor   sha256("tensor" | name, dtype, shape | sha256 of the bytes)
    group    a binary tree over named digests, in the order of their names

What is equal in name, dtype, shape and bits has one digest, whatever device or memory layout it
has and in whatever order it is given. Of a group, a member and its branch, the ``log2 n`` digests
beside its way up, are enough to find the group's digest.

    >>> members = {name: text_digest(name) for name in "abc"}
    >>> climb("b", members["b"], branch_of(members, "b")) == group(members)
    True
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedexlora.exchange.untrusted import short

_HEX = re.compile(r"[0-9a-f]{64}")
_LEFT, _RIGHT = "<", ">"
"""On which side of a way up a digest stands."""


def tensor_digest(name: str, tensor: Tensor) -> str:
    """The digest of one named tensor."""
    plain = tensor.detach().cpu().contiguous()
    content = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return _hashed("tensor", json.dumps([name, dtype, list(tensor.shape)]), content)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The digest of a group of tensors, by name."""
    return group({name: tensor_digest(name, tensor) for name, tensor in tensors.items()})


def text_digest(text: str) -> str:
    """The digest of a text."""
    return _hashed("text", text)


def group(members: Mapping[str, str]) -> str:
    """The digest of named digests; their order does not matter."""
    levels = _levels(members)
    return levels[-1][0] if levels[-1] else _hashed("empty")


def branch_of(members: Mapping[str, str], name: str) -> list[str]:
    """What leads from one member of a group to the group, from the leaves up.

    Returns:
        Digests, each behind ``<`` or ``>``: the side on which it stands.
    """
    place, branch = sorted(members).index(name), []
    for level in _levels(members)[:-1]:
        beside = place ^ 1
        if beside < len(level):
            branch.append(f"{_LEFT if beside < place else _RIGHT}{level[beside]}")
        place //= 2
    return branch


def climb(name: str, digest: str, branch: Sequence[object]) -> str:
    """The digest of the group that a member's branch leads to.

    Raises:
        ValueError: if ``branch`` is none.
    """
    found = _hashed("member", json.dumps(name), digest)
    for beside in branch:
        if not isinstance(beside, str) or beside[:1] not in {_LEFT, _RIGHT}:
            raise ValueError(f"expected a digest and its side, found {short(beside)}")
        other = known_digest(beside[1:])
        found = _hashed("pair", *((other, found) if beside[0] == _LEFT else (found, other)))
    return found


def known_digest(value: object) -> str:
    """A digest that somebody else sent.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise ValueError(f"expected a digest of 64 hexadecimal digits, found {short(value)}")
    return value


def _levels(members: Mapping[str, str]) -> list[list[str]]:
    """The tree from its leaves up; the last of an odd number moves up as it is."""
    levels = [[_hashed("member", json.dumps(name), members[name]) for name in sorted(members)]]
    while len(levels[-1]) > 1:
        below = levels[-1]
        pairs = [_hashed("pair", *below[i : i + 2]) for i in range(0, len(below) - 1, 2)]
        levels.append([*pairs, *below[len(below) - len(below) % 2 :]])
    return levels


def _hashed(kind: str, *parts: str) -> str:
    """SHA-256 of parts, none of which can be taken for another's or another kind's."""
    return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()
