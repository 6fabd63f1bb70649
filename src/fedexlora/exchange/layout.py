"""What the tensors of a version are called in messages and files.

A/MODULE, B/MODULE                        factors of the common adapter
own.A/MODULE/CLIENT, own.B/MODULE/CLIENT  of a client that has its own, and of those that share it
dense/NAME                                a head or bias
total/MODULE, or total.A/ and total.B/    the cumulative remainder, dense or in factors
piece3/MODULE, or piece3.A/ and piece3.B/ what step 3 adds to it; piece/ and so on in its file
step3/A/MODULE, step3/dense/NAME          of step 3, in a message that leads further
memory.A/MODULE, memory.rows/MODULE       what the server remembers of a module, in a step's file
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.spec import TensorSpec
from fedexlora.exchange.untrusted import short
from fedexlora.exchange.wire import unpack
from fedexlora.texts import few

MEMORY = "memory"
"""How the names begin of what the server remembers of a module."""
MEMORY_PARTS = ("A", "B", "rows", "columns")
"""What that may be: factors of a matrix ``(M, N)``, and a number for each row and column of one."""
NO_MEMORY: Mapping[str, Tensor] = MappingProxyType({})
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What factors, remainders, heads and biases are held in."""


def adapter_tensors(
    adapter: Mapping[str, Factors], letters: Sequence[str] = ("A", "B")
) -> dict[str, Tensor]:
    """The factors of every module, both or those of ``letters``."""
    return {
        f"{letter}/{name}": factors.A if letter == "A" else factors.B
        for name, factors in adapter.items()
        for letter in letters
    }


def dense_tensors(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Heads and biases."""
    return {f"dense/{name}": tensor for name, tensor in dense.items()}


def dense_from(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`dense_tensors` named."""
    return {n.removeprefix("dense/"): t for n, t in tensors.items() if n.startswith("dense/")}


Owned = TypeVar("Owned")


def each_once(own: Mapping[str, Owned]) -> tuple[dict[str, Owned], dict[str, str]]:
    """What clients have, of which several may have the same: whatever is one object.

    Returns:
        By the first client that has it, every one; and by every other client, that first one.
    """
    first: dict[int, str] = {}
    holder = {client: first.setdefault(id(own[client]), client) for client in sorted(own)}
    kept = {client: own[client] for client in own if holder[client] == client}
    return kept, {client: name for client, name in holder.items() if name != client}


def memory_tensors(module: str, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the server remembers of a module, by the names of a step's file.

    Raises:
        ValueError: if it is anything but :data:`MEMORY_PARTS`.
    """
    if odd := memory.keys() - set(MEMORY_PARTS):
        wanted = ", ".join(MEMORY_PARTS)
        raise ValueError(f"memory of {module}: expected some of {wanted}, found {sorted(odd)}")
    return {f"{MEMORY}.{part}/{module}": tensor for part, tensor in memory.items()}


def own_tensors(own: Mapping[str, Mapping[str, Factors]]) -> dict[str, Tensor]:
    """The factors of clients that have their own."""
    return {
        f"own.{letter}/{name}/{client}": factors.A if letter == "A" else factors.B
        for client, adapter in own.items()
        for name, factors in adapter.items()
        for letter in "AB"
    }


def own_from(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Factors]]:
    """What :func:`own_tensors` named.

    Raises:
        ValueError: if a factor is missing.
    """
    own: dict[str, dict[str, Factors]] = {}
    for key in (key for key in tensors if key.startswith("own.A/")):
        name, _, client = key.removeprefix("own.A/").partition("/")
        other = tensors.get(f"own.B/{name}/{client}")
        if other is None:
            raise ValueError(f"{key}: factor B is missing")
        own.setdefault(client, {})[name] = Factors(tensors[key], other)
    return own


def lowrank_tensors(prefix: str, values: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Matrices that are factored or dense; zero matrices are left out."""
    tensors: dict[str, Tensor] = {}
    for name, matrix in values.items():
        if matrix.is_zero:
            continue
        if isinstance(matrix.value, Factors):
            tensors[f"{prefix}.A/{name}"] = matrix.value.A
            tensors[f"{prefix}.B/{name}"] = matrix.value.B
        else:
            tensors[f"{prefix}/{name}"] = matrix.value
    return tensors


def lowrank_from(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """What :func:`lowrank_tensors` named, by module; what is absent is zero.

    Raises:
        ValueError: if a factor is missing, or a matrix is none.
    """
    found: dict[str, LowRank] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{prefix}.A/"):
            name = key.removeprefix(f"{prefix}.A/")
            other = tensors.get(f"{prefix}.B/{name}")
            if other is None:
                raise ValueError(f"{key}: factor B is missing")
            found[name] = LowRank(Factors(tensor, other))
        elif key.startswith(f"{prefix}/"):
            if tensor.ndim != 2:
                raise ValueError(f"{key}: expected a matrix, found {list(tensor.shape)}")
            found[key.removeprefix(f"{prefix}/")] = LowRank(tensor)
    return found


def unpack_finite(message: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a message that holds a version, or what leads to one.

    Raises:
        ValueError: if the message is damaged, or no model can be made of its numbers.
    """
    tensors, header = unpack(message)
    faults = [fault for name, tensor in tensors.items() for fault in not_finite(name, tensor)]
    if faults:
        raise ValueError("; ".join(few(faults)))
    return tensors, header


def not_finite(name: str, tensor: Tensor) -> list[str]:
    """Why no model can be made of a tensor's numbers; nothing if one can."""
    if tensor.dtype in _DTYPES and bool(tensor.reshape(-1).isfinite().all()):
        return []
    return [f"{name}: {TensorSpec.of(tensor)}, expected finite floating-point numbers"]


def refuse_others(tensors: Mapping[str, Tensor], known: Collection[str]) -> None:
    """Refuse a message of which something would be left over.

    Raises:
        ValueError: naming the tensors that are not among ``known``.
    """
    if others := sorted(tensors.keys() - set(known)):
        raise ValueError(f"unexpected tensors: {short(others)}")
