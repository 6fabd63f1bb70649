"""The global model beside its untouched base: adapter, cumulative remainder, heads, version."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.spec import TensorSpec
from fedexlora.exchange.untrusted import short
from fedexlora.exchange.wire import digest, unpack
from fedexlora.texts import few

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What factors, remainders, heads and biases are held in."""


@dataclass(frozen=True)  # no slots: the fingerprint is kept
class GlobalState:
    """Version ``t`` of the global model: ``base + scaling * (total + B A)`` in every module.

    A client with an adapter of its own, ``(A_c, B_c)`` with scaling ``s_c``, holds the same model:
    it adds ``scaling * (total + B A) - s_c B_c A_c`` to the base and its adapter to that.
    """

    version: int
    """The number of rounds aggregated so far."""
    adapter: Mapping[str, Factors]
    """The factors that clients without their own continue from, by module."""
    total: Mapping[str, LowRank]
    """The cumulative remainder by module, unscaled, float64: rounds add up without drift."""
    dense: Mapping[str, Tensor]
    """Trained tensors that are not factors, by name: heads and biases."""
    own: Mapping[str, Mapping[str, Factors]] = field(default_factory=dict)
    """By client and module: the adapters of clients that do not continue from the common one."""

    def advance(
        self,
        adapter: Mapping[str, Factors],
        pieces: Mapping[str, LowRank],
        dense: Mapping[str, Tensor],
        own: Mapping[str, Mapping[str, Factors]],
    ) -> GlobalState:
        """The next version, with one round's remainder added to the total.

        Server and clients both come from one version to the next through here, so that they hold
        the same bits.
        """
        total = {name: held.accumulate(pieces[name]) for name, held in self.total.items()}
        return GlobalState(self.version + 1, dict(adapter), total, dict(dense), dict(own))

    def fingerprint(self) -> str:
        """SHA-256 of what all clients hold alike: equal if and only if the bits are."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return digest(state_tensors(self.common()), str(self.version))

    def adapter_of(self, client: str) -> Mapping[str, Factors]:
        """The factors that a client continues from, by module."""
        return self.own.get(client, self.adapter)

    def start(self) -> GlobalState:
        """What clients began to train from: this version without the remainder."""
        return replace(self, total={})

    def common(self) -> GlobalState:
        """What all clients hold alike: this version without the clients' own adapters."""
        return replace(self, own={})


def lowrank_tensors(prefix: str, values: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Named tensors of matrices that are factored or dense; zero matrices are left out."""
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


def lowrank_from(
    prefix: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, LowRank]:
    """What :func:`lowrank_tensors` wrote, for the modules of ``shapes``; absent means zero.

    Raises:
        ValueError: if a matrix has another shape than its module.
    """
    found: dict[str, LowRank] = {}
    for name, shape in shapes.items():
        if f"{prefix}/{name}" in tensors:
            found[name] = LowRank(tensors[f"{prefix}/{name}"])
        elif f"{prefix}.A/{name}" in tensors:
            a, b = tensors[f"{prefix}.A/{name}"], tensors[f"{prefix}.B/{name}"]
            found[name] = LowRank(Factors(a, b))
        else:
            found[name] = LowRank.zeros(*shape, torch.float64)
        if found[name].shape != shape:
            raise ValueError(f"{prefix} of {name}: expected {shape}, found {found[name].shape}")
    return found


def adapter_tensors(
    adapter: Mapping[str, Factors], letters: Sequence[str] = ("A", "B")
) -> dict[str, Tensor]:
    """The factors of every module by their names on the wire, both or those of ``letters``."""
    return {
        f"{letter}/{name}": factors.A if letter == "A" else factors.B
        for name, factors in adapter.items()
        for letter in letters
    }


def state_tensors(state: GlobalState) -> dict[str, Tensor]:
    """Every tensor of a state by name, as stored in checkpoints."""
    tensors = lowrank_tensors("total", state.total) | adapter_tensors(state.adapter)
    for client, adapter in state.own.items():
        for name, factors in adapter.items():
            tensors[f"own.A/{name}/{client}"] = factors.A
            tensors[f"own.B/{name}/{client}"] = factors.B
    return tensors | {f"dense/{name}": tensor for name, tensor in state.dense.items()}


def factors_of(name: str, a: Tensor, b: Tensor, like: Factors) -> Factors:
    """Factors of the module that ``like`` is of; their rank may be another.

    Raises:
        ValueError: if they are of another shape.
    """
    found = Factors(a, b)
    if found.shape != like.shape:
        raise ValueError(f"factors of {name}: expected {like.shape}, found {found.shape}")
    return found


def unpack_state(message: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a message that holds a version, or what leads to one.

    Raises:
        ValueError: if the message is damaged, or no model can be made of its numbers.
    """
    tensors, header = unpack(message)
    faults = [
        f"{name}: {TensorSpec.of(tensor)}, expected finite floating-point numbers"
        for name, tensor in tensors.items()
        if tensor.dtype not in _DTYPES or not tensor.reshape(-1).isfinite().all()
    ]
    if faults:
        raise ValueError("; ".join(few(faults)))
    return tensors, header


def refuse_others(tensors: Mapping[str, Tensor], known: Collection[str]) -> None:
    """Refuse a message of which something would be left over.

    Raises:
        ValueError: naming the tensors that are not among ``known``.
    """
    if others := sorted(tensors.keys() - set(known)):
        raise ValueError(f"unexpected tensors: {short(others)}")


def state_from(version: int, tensors: Mapping[str, Tensor]) -> GlobalState:
    """What :func:`state_tensors` wrote.

    Raises:
        ValueError: if a factor is missing, or shapes do not fit together.
    """
    modules = [name.removeprefix("A/") for name in tensors if name.startswith("A/")]
    if missing := [name for name in modules if f"B/{name}" not in tensors]:
        raise ValueError(f"factor B is missing for {short(missing)}")
    adapter = {name: Factors(tensors[f"A/{name}"], tensors[f"B/{name}"]) for name in modules}
    total = lowrank_from("total", tensors, {name: f.shape for name, f in adapter.items()})
    if narrow := [name for name, matrix in total.items() if matrix.value.dtype != torch.float64]:
        raise ValueError(f"the total is not float64 for {narrow}")
    dense = {n.removeprefix("dense/"): t for n, t in tensors.items() if n.startswith("dense/")}
    own: dict[str, dict[str, Factors]] = {}
    for key in (key for key in tensors if key.startswith("own.A/")):
        name, _, client = key.removeprefix("own.A/").partition("/")
        other = tensors.get(f"own.B/{name}/{client}")
        if other is None or name not in adapter:
            raise ValueError(f"{key}: factor B is missing, or there is no such module")
        own.setdefault(client, {})[name] = factors_of(name, tensors[key], other, adapter[name])
    return GlobalState(version, adapter, total, dense, own)
