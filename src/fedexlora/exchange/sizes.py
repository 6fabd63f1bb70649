"""How many bytes messages and files of versions have, before there are any numbers in them.

States, steps and updates have tensors on torch's meta device here: the same layouts decide what is
in a message, and ``packed_size`` how long it is. Digests and ids, which all have one length, are
zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank
from fedexlora.exchange.digest import branch_of
from fedexlora.exchange.layout import adapter_tensors, each_once, own_tensors
from fedexlora.exchange.snapshot import snapshot_tensors
from fedexlora.exchange.spec import AdapterSpec, ModuleSpec, TensorSpec
from fedexlora.exchange.state import GlobalState, state_tensors
from fedexlora.exchange.step import Step, StepDigests, encode_steps
from fedexlora.exchange.update import ClientUpdate
from fedexlora.exchange.version import Adapter
from fedexlora.exchange.wire import packed_size

_DIGEST = "0" * 64
_DIGESTS = StepDigests(_DIGEST, _DIGEST, _DIGEST, _DIGEST)
_LOSS = 0.1234567890123456
"""A number with as many digits as most have."""


def shape_factors(module: ModuleSpec) -> Factors:
    """Factors of a module without numbers."""
    return Factors(shape_tensor(module.factor("A")), shape_tensor(module.factor("B")))


def shape_tensor(spec: TensorSpec) -> torch.Tensor:
    """A tensor without numbers."""
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def shape_adapter(spec: AdapterSpec) -> Adapter:
    """The factors of an adapter without numbers, by module."""
    return {name: shape_factors(module) for name, module in spec.modules.items()}


def shape_state(
    version: int,
    spec: AdapterSpec,
    total: Mapping[str, LowRank],
    own: Mapping[str, Adapter] | None = None,
) -> GlobalState:
    """A version without numbers.

    Args:
        version: which.
        spec: the common adapter.
        total: the cumulative remainder, on the meta device.
        own: the adapters of clients that have their own; of equal ones, one object.
    """
    dense = {name: shape_tensor(found) for name, found in spec.dense.items()}
    state = GlobalState(version, _DIGEST, shape_adapter(spec), total, dense, own or {})
    state.__dict__["own_digests"] = dict.fromkeys(state.own, _DIGEST)
    return state


def shape_step(
    version: int,
    spec: AdapterSpec,
    letters: Sequence[str],
    pieces: Mapping[str, LowRank],
    own: Mapping[str, Adapter] | None = None,
) -> Step:
    """A step without numbers.

    Args:
        version: the one that it leads to.
        spec: what clients send in its round.
        letters: the factors that it changes, of ``("A", "B")``.
        pieces: of remainder, by module.
        own: the adapters of clients that change.
    """
    factors = adapter_tensors(shape_adapter(spec), letters)
    dense = {name: shape_tensor(found) for name, found in spec.dense.items()}
    kept, shared = each_once(own or {})
    return Step(version, _DIGEST, factors, dense, pieces, _DIGESTS, kept, shared)


def update_size(
    spec: AdapterSpec, client: str, round_: int, rows: int, base: str, *, remembers: bool = False
) -> int:
    """The bytes of a client's update.

    Args:
        spec: of the adapter that it trains.
        client: its name.
        round_: the round.
        rows: its training rows.
        base: the fingerprint of the base.
        remembers: whether the client says of which round its memory is.
    """
    tensors = {name: shape_tensor(found) for name, found in spec.tensors().items()}
    update = ClientUpdate(client, round_, _DIGEST, rows, _LOSS, base, tensors)
    if remembers:
        update = replace(update, memory=round_ - 1)
    return packed_size(tensors, update.header())


def steps_size(steps: Sequence[Step]) -> int:
    """The bytes of a message with steps that follow each other."""
    tensors, more = encode_steps(steps)
    last, since = steps[-1].version, steps[0].version - 1
    return packed_size(tensors, {"version": last, "id": _DIGEST, "since": since, **more})


def snapshot_size(state: GlobalState) -> int:
    """The bytes of a version whole, as a newcomer gets it: the total in float32."""
    total = {name: matrix.to(torch.float32) for name, matrix in state.total.items()}
    header = {"version": state.version, "id": state.id, "since": None, "own": _DIGEST}
    return packed_size(snapshot_tensors(state, total), header)


def own_size(state: GlobalState, client: str) -> int:
    """The bytes of the message with a client's own adapter; 0 for a client without."""
    if client not in state.own:
        return 0
    branch = branch_of(state.own_digests, client)
    header = {"version": state.version, "client": client, "branch": branch}
    return packed_size(adapter_tensors(state.own[client]), header)


def step_file_size(step: Step) -> int:
    """About the bytes of a step's file: its header has room to spare, which is not counted."""
    tensors, _ = encode_steps([step])
    return packed_size(tensors | own_tensors(step.own), {})


def snapshot_file_size(state: GlobalState) -> int:
    """About the bytes of a snapshot's file, whose total is float64."""
    return packed_size(state_tensors(state), {})


def held_bytes(values: Mapping[str, LowRank], dtype: torch.dtype) -> int:
    """The bytes of the numbers of matrices in a dtype."""
    return sum(matrix.numel for matrix in values.values()) * dtype.itemsize


def shape_lowrank(shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> LowRank:
    """A matrix without numbers: in factors of a rank, or dense if that is None."""
    d_out, d_in = shape
    if rank is None:
        return LowRank(torch.empty(d_out, d_in, dtype=dtype, device="meta"))
    a, b = ((rank, d_in), (d_out, rank))
    pair = (torch.empty(x, dtype=dtype, device="meta") for x in (a, b))
    return LowRank(Factors(*pair))


def rank_of(matrix: LowRank) -> int | None:
    """The rank of its factors; None of a dense matrix."""
    return matrix.value.rank if isinstance(matrix.value, Factors) else None
