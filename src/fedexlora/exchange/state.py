"""The global model beside its untouched base: adapter, cumulative remainder, heads, version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank


@dataclass(frozen=True, slots=True)
class GlobalState:
    """Version ``t`` of the global model: ``base + scaling * (total + B A)`` in every module."""

    version: int
    """The number of rounds aggregated so far."""
    adapter: Mapping[str, Factors]
    """The factors that clients continue from, by module."""
    total: Mapping[str, LowRank]
    """The cumulative remainder by module, unscaled: float32 factors, or dense in float64."""
    dense: Mapping[str, Tensor]
    """Trained tensors that are not factors, by name: heads and biases."""

    def advance(
        self,
        adapter: Mapping[str, Factors],
        pieces: Mapping[str, LowRank],
        dense: Mapping[str, Tensor],
    ) -> GlobalState:
        """The next version, with one round's remainder added to the total.

        Server and clients both come from one version to the next through here, so that they hold
        the same bits.
        """
        total = {
            name: held
            if (piece := pieces[name]).is_zero
            else held.plus([piece.value], dense_dtype=torch.float64)
            for name, held in self.total.items()
        }
        return GlobalState(self.version + 1, dict(adapter), total, dict(dense))


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
            found[name] = LowRank.zeros(*shape, torch.float32)
        if found[name].shape != shape:
            raise ValueError(f"{prefix} of {name}: expected {shape}, found {found[name].shape}")
    return found


def state_tensors(state: GlobalState) -> dict[str, Tensor]:
    """Every tensor of a state by name, as stored in checkpoints."""
    tensors = lowrank_tensors("total", state.total)
    for name, factors in state.adapter.items():
        tensors[f"A/{name}"], tensors[f"B/{name}"] = factors.A, factors.B
    return tensors | {f"dense/{name}": tensor for name, tensor in state.dense.items()}


def state_from(version: int, tensors: Mapping[str, Tensor]) -> GlobalState:
    """What :func:`state_tensors` wrote.

    Raises:
        ValueError: if a factor is missing, or shapes do not fit together.
    """
    modules = [name.removeprefix("A/") for name in tensors if name.startswith("A/")]
    if missing := [name for name in modules if f"B/{name}" not in tensors]:
        raise ValueError(f"factor B is missing for {missing}")
    adapter = {name: Factors(tensors[f"A/{name}"], tensors[f"B/{name}"]) for name in modules}
    total = lowrank_from("total", tensors, {name: f.shape for name, f in adapter.items()})
    dense = {n.removeprefix("dense/"): t for n, t in tensors.items() if n.startswith("dense/")}
    return GlobalState(version, adapter, total, dense)
