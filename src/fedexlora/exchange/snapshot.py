"""A version whole, for whoever holds nothing that steps could lead on from.

    digest(snapshot) = tree over id         the version that it is
                                 adapter    all factors, also those that are frozen
                                 heads      heads and biases
                                 own        by client, the adapters of those that have their own
                                 total      by module, the cumulative remainder

Newcomers get the total at its numerical rank in float32. A process of the server's own machine
that keeps nothing from one request to the next gets it bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedexlora.algebra.factors import Factors
from fedexlora.algebra.lowrank import LowRank, break_even
from fedexlora.algebra.product import compact
from fedexlora.errors import SnapshotError
from fedexlora.exchange.digest import group, known_digest, tensors_digest, text_digest
from fedexlora.exchange.layout import (
    adapter_tensors,
    dense_from,
    dense_tensors,
    lowrank_tensors,
    refuse_others,
)
from fedexlora.exchange.state import GlobalState, adapter_from, total_from
from fedexlora.exchange.version import Adapter


def encode_snapshot(
    state: GlobalState, *, bitwise: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """A version without the clients' own adapters, as tensors and fields of a header.

    Args:
        state: the version.
        bitwise: leave the total as it is, in float64.

    Returns:
        Tensors, fields, and the digest that is announced.
    """
    total = state.total if bitwise else {n: _compacted(x) for n, x in state.total.items()}
    header = {"own": group(state.own_digests)}
    digest = _digest(state.version, state.id, state.adapter, total, state.dense, header["own"])
    return snapshot_tensors(state, total), header, digest


def snapshot_tensors(state: GlobalState, total: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """What of a version is in a snapshot, by name.

    Args:
        state: the version.
        total: its cumulative remainder as it is sent.
    """
    tensors = lowrank_tensors("total", total) | adapter_tensors(state.adapter)
    return tensors | dense_tensors(state.dense)


def decode_snapshot(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any], version: int, id_: str, announced: str
) -> tuple[GlobalState, str]:
    """What :func:`encode_snapshot` made, and the digest of the clients' own adapters.

    Args:
        tensors: by name.
        header: its fields.
        version: the version that it is of.
        id_: its id.
        announced: the digest that the request has announced.

    Raises:
        ValueError: if something is missing, left over or of another shape.
        SnapshotError: if it is not the one that was announced.
    """
    adapter, dense, own = adapter_from(tensors), dense_from(tensors), known_digest(header["own"])
    total = total_from(tensors, adapter)
    found = _digest(version, id_, adapter, total, dense, own)
    if found != announced:
        raise SnapshotError(
            f"the snapshot of version {version} is not the one that was announced",
            [f"digest: expected {announced}, found {found}"],
        )
    wide = {name: matrix.to(torch.float64) for name, matrix in total.items()}
    state = GlobalState(version, id_, adapter, wide, dense)
    refuse_others(tensors, snapshot_tensors(state, total))
    return state, own


def _digest(
    version: int,
    id_: str,
    adapter: Adapter,
    total: Mapping[str, LowRank],
    dense: Mapping[str, Tensor],
    own: str,
) -> str:
    return group(
        {
            "id": text_digest(f"{version} {id_}"),
            "adapter": tensors_digest(adapter_tensors(adapter)),
            "heads": tensors_digest(dense_tensors(dense)),
            "own": own,
            "total": tensors_digest(lowrank_tensors("total", total)),
        }
    )


def _compacted(total: LowRank) -> LowRank:
    """The total at its numerical rank, or dense where that is smaller, in float32."""
    if isinstance(total.value, Factors) and not total.is_zero:
        low = compact(total.value)
        total = LowRank(low if low.rank < break_even(*low.shape) else low.product())
    return total.to(torch.float32)
